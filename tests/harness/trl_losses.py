"""TRL's losses on log-probs of our choice, beside ours: the trainers' own methods compute them.

The tokens of a completion have the same log-prob, after a prompt of one token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_bdpo import losses
from megatron_bdpo.losses import AnswerLogProbs, PairLogProbs
from tests.harness.loss_cases import with_targets

PAIRS = 16
BETA = 0.3
GAMMA = 0.4

Lengths = int | Tensor
"""Tokens of all completions, or of each chosen and rejected one, [2, PAIRS]."""
Values = list[Tensor]
"""Log-probs per token of policy (chosen, rejected) and reference (likewise), [PAIRS] each."""


def log_probs(dtype: torch.dtype = torch.float64, least: float = -8.0) -> Values:
    """Drawn between ``least`` and 0, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = (least * torch.rand(4, PAIRS, generator=generator, dtype=torch.float64)).to(dtype)
    return [each.requires_grad_(row < 2) for row, each in enumerate(drawn.unbind())]


def dpo_trainer(
    types: str | dict[str, float],
    tokens: Lengths,
    values: Values,
    collision_entropies: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """DPOTrainer's loss, a mean over the pairs.

    Args:
        types: its loss type, or several with their weights.
        collision_entropies: [2, PAIRS] per token, of chosen and rejected; with them the loss is weighed.
        settings: of DPOConfig.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    lengths, ld_alpha = of_each(tokens), settings.get("ld_alpha")
    longest, common = int(lengths.max()), lengths.amin(dim=0)
    place = torch.arange(1 + longest)
    present = (place <= lengths.flatten()[:, None]).long()
    completion = present * (place > 0)
    per_token = torch.cat(values[:2])[:, None] * completion[:, 1:]  # as of a model: 0 where there is nothing
    nothing = torch.zeros(2 * PAIRS, longest, dtype=per_token.dtype)
    # As the trainer computes a reference's log-probs ahead.
    counted = lengths if ld_alpha is None else common + ld_alpha * (lengths - common).to(per_token.dtype)
    output = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    if collision_entropies is not None:
        output.log_sum_sq_probs = -collision_entropies.flatten()[:, None].expand(-1, longest)
    model = mock.Mock(training=False, return_value=output)
    weights = {types: 1.0} if isinstance(types, str) else types
    trainer = SimpleNamespace(
        model=model,
        accelerator=mock.Mock(device="cpu", gather=lambda each: each, gather_for_metrics=lambda each: each),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=True,
        f_divergence_type=settings.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        loss_types=[*weights],
        loss_weights=[*weights.values()],
        beta=BETA,
        use_weighting=collision_entropies is not None,
        label_smoothing=settings.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau")),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    given = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": present,
        "completion_mask": completion,
        "ref_chosen_logps": values[2] * counted[0],
        "ref_rejected_logps": values[3] * counted[1],
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, model, given, return_outputs=False)
    return loss


def of_each(tokens: Lengths) -> Tensor:
    """[2, PAIRS]"""
    return torch.as_tensor(tokens).expand(2, PAIRS)


def mismatched(values: Values) -> tuple[Tensor, Tensor]:
    """Log-probs of policy and reference, [2 PAIRS] per token and without gradient, of the answers after other prompts:
    on the mean the policy's are higher, so that z is above 0."""
    policy, reference = (torch.stack(each, 1).flatten().detach().roll(1) for each in (values[:2], values[2:]))
    return policy + 1, reference


def kto_trainer(
    kind: str, tokens: int, values: Values, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """KTOTrainer's loss, twice the mean over answers: of each pair two, desirable and undesirable."""
    from trl.trainer.kto_trainer import KTOTrainer

    def per_token(each: Tensor) -> SimpleNamespace:
        spread = each[:, None].expand(-1, tokens)
        nothing = torch.zeros_like(spread)
        return SimpleNamespace(log_probs=spread, entropy=nothing, mean_logits=nothing)

    completion = torch.ones(2 * PAIRS, 1 + tokens, dtype=torch.int64)
    completion[:, 0] = 0
    policy, reference = (torch.stack(each, 1).flatten() for each in (values[:2], values[2:]))
    other_policy, other_reference = mismatched(values)
    model = mock.Mock(training=False, side_effect=[per_token(other_policy), per_token(policy)][kind != "kto" :])
    trainer = SimpleNamespace(
        model=model,
        accelerator=mock.Mock(device="cpu", gather_for_metrics=lambda each: each),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_type=kind,
        calculate_KL=kind == "kto",
        beta=BETA,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    names = {"input_ids": torch.zeros_like(completion), "attention_mask": torch.ones_like(completion)}
    given = {name: value for prefix in ("", "KL_") for name, value in ((prefix + key, names[key]) for key in names)}
    given |= {"completion_mask": completion, "KL_completion_mask": completion}
    given |= {"label": torch.tensor([True, False] * PAIRS)}
    given |= {"ref_logps": reference * tokens, "ref_KL_logps": other_reference * tokens}
    loss: Tensor = KTOTrainer._compute_loss(trainer, model, given, return_outputs=False)
    return 2 * loss


def cpo_trainer(kind: str, tokens: int, values: Values, alpha: float = 0.0) -> Tensor:
    """CPOTrainer's loss without its NLL. ``simpo`` is one of log-probs per token, as it hands them over."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=alpha,
        beta=BETA,
        label_smoothing=0.0,
        loss_type=kind,
        simpo_gamma=GAMMA,
    )
    scale = 1 if kind == "simpo" else tokens
    found, *_ = CPOTrainer.cpo_loss(trainer, *(scale * each for each in values[:2]))
    return found.mean()


def orpo_trainer(kind: str, tokens: int, values: Values) -> Tensor:
    """ORPOTrainer's loss, with its NLL: a mean over tokens, of which all pairs have as many."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=BETA)
    found, *_ = ORPOTrainer.odds_ratio_loss(trainer, *values[:2])
    return -values[0].mean() - found.mean()


@dataclass(frozen=True)
class Counterpart:
    """A loss of TRL's that is one of ours."""

    kind: str
    """``loss_type``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """TRL's."""
    options: dict[str, Any] = field(default_factory=dict)
    """Ours, beside ``beta`` and settings of the same names."""
    trainer: Callable[..., Tensor] = dpo_trainer
    in_single: bool = False
    """TRL computes a part of it in float32, whatever its inputs are."""

    @property
    def name(self) -> str:
        """For a table."""
        names = {dpo_trainer: "DPO", cpo_trainer: "CPO", orpo_trainer: "ORPO", kto_trainer: "KTO"}
        trainer = f"{names[self.trainer]}Trainer"
        return f"{trainer}, `{self.kind}`" if self.kind else trainer

    @property
    def of_ours(self) -> dict[str, Any]:
        """All of our options but ``beta``."""
        return {name: value for name, value in self.settings.items() if name != "alpha"} | self.options

    def loss(self, tokens: Lengths, values: Values, **more: Any) -> Tensor:
        return self.trainer(self.kind, tokens, values, **self.settings, **more)


LABELS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}

COUNTERPARTS: dict[str, Counterpart] = {
    "alphapo": Counterpart("simpo", {"alpha": 0.25}, {"simpo_gamma": GAMMA, "alphapo_alpha": 0.25}, cpo_trainer),
    "aot": Counterpart("aot", {"label_smoothing": 0.1}),
    "aot_unpaired": Counterpart("aot_unpaired", {"label_smoothing": 0.1}),
    "apo_down": Counterpart("apo_down"),
    "apo_zero": Counterpart("apo_zero"),
    "apo_zero_unpaired": Counterpart("apo_zero_unpaired", LABELS, trainer=kto_trainer),
    "bco_pair": Counterpart("bco_pair"),
    "cpo": Counterpart("sigmoid", {}, {"nll_weight": 0.0}, cpo_trainer),
    "discopop": Counterpart("discopop", {"discopop_tau": 0.5}),
    "dpo": Counterpart("sigmoid"),
    "exo_pair": Counterpart("exo_pair", {"label_smoothing": 0.1}, in_single=True),
    "hinge": Counterpart("hinge"),
    "ipo": Counterpart("ipo"),
    "kto": Counterpart("kto", LABELS, trainer=kto_trainer),
    "nca_pair": Counterpart("nca_pair"),
    "orpo": Counterpart("", {}, {"orpo_weight": BETA}, orpo_trainer, in_single=True),
    "robust": Counterpart("robust", {"label_smoothing": 0.2}),
    "sft": Counterpart("sft"),
    "sigmoid_norm": Counterpart("sigmoid_norm"),
    "simpo": Counterpart("simpo", {}, {"simpo_gamma": GAMMA}, cpo_trainer),
    "sppo_hard": Counterpart("sppo_hard"),
}


def ours(
    name: str, options: dict[str, Any], tokens: Lengths, values: Values, collision_entropies: Tensor | None = None
) -> Tensor:
    """Our loss, a mean over the pairs; of labelled answers the mean of what a pair's two add up to."""
    if losses.get(name).takes == "answers":
        assert isinstance(tokens, int)
        return ours_of_answers(name, options, tokens, values)
    known: dict[str, Any] = {"beta": BETA} if "beta" in vars(losses.build_options(name, {})) else {}
    lengths = of_each(tokens)
    chosen, rejected, *reference = (each * lengths[row % 2] for row, each in enumerate(values))
    of_beginnings = [each * lengths.amin(dim=0) for each in values]
    pairs = PairLogProbs(chosen, rejected, *lengths, *reference)
    names = [f"{model}_{side}_beginning" for model in ("policy", "reference") for side in ("chosen", "rejected")]
    pairs = replace(pairs, **dict(zip(names, of_beginnings, strict=True)))
    if collision_entropies is not None:
        chosen, rejected = lengths * collision_entropies
        pairs = replace(pairs, chosen_collision_entropy=chosen, rejected_collision_entropy=rejected)
        known["use_weighting"] = True
    spec, all_options = losses.get(name), losses.build_options(name, known | options)
    return spec.function(with_targets(spec, pairs, all_options), all_options).loss.mean()


def ours_of_answers(name: str, options: dict[str, Any], tokens: int, values: Values) -> Tensor:
    spec, all_options = losses.get(name), losses.build_options(name, {"beta": BETA} | options)
    policy, reference = (tokens * torch.stack(each, 1).flatten() for each in (values[:2], values[2:]))
    length, labels = torch.full((2 * PAIRS,), tokens), torch.tensor([True, False] * PAIRS)
    answers = AnswerLogProbs(policy, length, labels, reference)
    if spec.step_shift:
        others = (tokens * each for each in mismatched(values))
        seen = replace(answers, **dict(zip(("policy", "reference"), others, strict=True)))
        shift = spec.step_shift(seen, all_options)
        assert isinstance(shift, Tensor) and shift > 0
        answers = replace(answers, shift=shift)
    return 2 * spec.function(answers, all_options).loss.mean()


def apart(own: Callable[[Values], Tensor], theirs: Callable[[Values], Tensor], values: Callable[[], Values]) -> float:
    """How far two losses are from one another: the largest difference of their means over pairs and of the gradients of
    their sums, absolute below 1 and relative above."""
    results = []
    for loss in (own, theirs):
        here = values()
        found = loss(here)
        gradients = torch.autograd.grad(PAIRS * found, here[:2])
        results.append(torch.cat([found.detach()[None], *gradients]))
    mine, expected = (each.double() for each in results)
    return float(((mine - expected).abs() / expected.abs().clamp(min=1)).max())
