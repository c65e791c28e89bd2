"""The losses of TRL's trainers on log-probs of our choice: value and gradient of every loss that both have.

TRL's own code computes them, from a model whose output is given. What the whole trainer does is in `test_trl.py`.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import PairLogProbs

trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason="the oracle is TRL's DPOTrainer")

PAIRS = 16

#: Ours, with its options; TRL's name, with its settings.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "dpo": ({}, "sigmoid", {}),
    "hinge": ({}, "hinge", {}),
    "ipo": ({}, "ipo", {}),
    "exo_pair": ({"label_smoothing": 0.1}, "exo_pair", {"label_smoothing": 0.1}),
    "nca_pair": ({}, "nca_pair", {}),
    "robust": ({"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    "bco_pair": ({}, "bco_pair", {}),
    "sppo_hard": ({}, "sppo_hard", {}),
    "apo_zero": ({}, "apo_zero", {}),
    "apo_down": ({}, "apo_down", {}),
    "discopop": ({"discopop_tau": 0.5}, "discopop", {"discopop_tau": 0.5}),
    "sft": ({}, "sft", {}),
    "sigmoid_norm": ({}, "sigmoid_norm", {}),
}

#: Losses that TRL takes another divergence with (``DPOConfig.f_divergence_type``), but SFT, which has no use for it.
OF_DIFFERENCE = ("dpo", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")

DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js_divergence"},
    {"f_divergence": "alpha_divergence"},
    {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
    {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]

BETA = 0.3


def log_probs(dtype: torch.dtype = torch.float64, least: float = -8.0) -> list[torch.Tensor]:
    """Of policy (chosen, rejected) and reference (likewise), per token, [PAIRS] each."""
    generator = torch.Generator().manual_seed(0)
    drawn = (least * torch.rand(4, PAIRS, generator=generator, dtype=torch.float64)).to(dtype)
    return [each.requires_grad_(row < 2) for row, each in enumerate(drawn.unbind())]


def theirs(
    name: str,
    settings: dict[str, Any],
    tokens: int,
    values: list[torch.Tensor],
    mixed: dict[str, float] | None = None,
    collision_entropies: torch.Tensor | None = None,
) -> torch.Tensor:
    """TRL's loss, a mean over the pairs, each of whose completions is `tokens` alike tokens after a prompt of one."""
    completion = torch.ones(2 * PAIRS, 1 + tokens, dtype=torch.int64)
    completion[:, 0] = 0
    per_token = (torch.cat(values[:2])[:, None]).expand(-1, tokens)
    nothing = torch.zeros(2 * PAIRS, tokens, dtype=per_token.dtype)
    output = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    if collision_entropies is not None:
        output.log_sum_sq_probs = -collision_entropies.flatten()[:, None].expand(-1, tokens)
    model = mock.Mock(training=False, return_value=output)
    trainer = SimpleNamespace(
        model=model,
        accelerator=mock.Mock(device="cpu", gather=lambda each: each, gather_for_metrics=lambda each: each),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=settings.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        loss_types=[*(mixed or [name])],
        loss_weights=[*(mixed or {name: 1.0}).values()],
        beta=BETA,
        use_weighting=collision_entropies is not None,
        label_smoothing=settings.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau")),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    given = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": values[2] * tokens,
        "ref_rejected_logps": values[3] * tokens,
    }
    loss: torch.Tensor = trl_dpo.DPOTrainer._compute_loss(trainer, model, given, return_outputs=False)
    return loss


def ours(
    name: str,
    options: dict[str, Any],
    tokens: int,
    values: list[torch.Tensor],
    collision_entropies: torch.Tensor | None = None,
) -> torch.Tensor:
    known: dict[str, Any] = {} if name == "sft" else {"beta": BETA}
    length = torch.full((PAIRS,), tokens)
    chosen, rejected, *reference = (each * tokens for each in values)
    pairs = PairLogProbs(chosen, rejected, length, length, *reference)
    if collision_entropies is not None:
        chosen, rejected = tokens * collision_entropies
        pairs = replace(pairs, chosen_collision_entropy=chosen, rejected_collision_entropy=rejected)
        known["use_weighting"] = True
    return losses.get(name).function(pairs, losses.build_options(name, known | options)).loss.mean()


#: Sums of float64 in another order; TRL keeps exo_pair's epsilon in float32.
EXACT, SINGLE = 1e-13, 1e-7
#: All in float32: some roundings of 6e-8.
ROUNDED = 2e-6


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, tokens):
    options, their_name, settings = CASES[name]
    allowed = SINGLE if name == "exo_pair" else EXACT
    values, expected_values = log_probs(), log_probs()
    loss, expected = ours(name, options, tokens, values), theirs(their_name, settings, tokens, expected_values)
    torch.testing.assert_close(loss, expected, rtol=allowed, atol=allowed)
    loss.backward()
    expected.backward()
    for own, one in zip(values[:2], expected_values[:2], strict=True):
        assert own.grad is not None and one.grad is not None
        torch.testing.assert_close(own.grad, one.grad, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"sft", "hinge"}))
def test_weighting(name):
    """But SFT, where TRL weighs each pair's share of the mean over all; and hinge, on which its backward fails."""
    options, their_name, settings = CASES[name]
    allowed = SINGLE if name == "exo_pair" else EXACT
    entropies = 4 * torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, expected_values = log_probs(), log_probs()
    loss = ours(name, options, 3, values, entropies)
    expected = theirs(their_name, settings, 3, expected_values, collision_entropies=entropies)
    torch.testing.assert_close(loss, expected, rtol=allowed, atol=allowed)
    loss.backward()
    expected.backward()
    for own, one in zip(values[:2], expected_values[:2], strict=True):
        torch.testing.assert_close(own.grad, one.grad, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_divergence(name, divergence):
    """In float32, which is all that TRL's alpha divergence takes; near the reference, where its DiscoPOP is finite."""
    options, their_name, settings = CASES[name]
    values, expected_values = log_probs(torch.float32, -2.0), log_probs(torch.float32, -2.0)
    loss = ours(name, options | divergence, 1, values)
    expected = theirs(their_name, settings | divergence, 1, expected_values)
    torch.testing.assert_close(loss, expected, rtol=ROUNDED, atol=ROUNDED)
    loss.backward()
    expected.backward()
    for own, one in zip(values[:2], expected_values[:2], strict=True):
        torch.testing.assert_close(own.grad, one.grad, rtol=ROUNDED, atol=ROUNDED)


def test_alpha_divergence_is_cut_where_trl_cuts_it():
    given = {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.2}
    values, expected_values = log_probs(torch.float32), log_probs(torch.float32)
    assert (0.8 * 30 * (values[2] - values[0]) > 80).any() and (0.8 * 30 * (values[3] - values[1]) > 80).any()
    loss, expected = ours("dpo", given, 30, values), theirs("sigmoid", given, 30, expected_values)
    torch.testing.assert_close(loss, expected, rtol=3e-5, atol=0)  # exponents up to 80, with roundings of 5e-6 each
    loss.backward()
    expected.backward()
    for own, one in zip(values[:2], expected_values[:2], strict=True):
        torch.testing.assert_close(own.grad, one.grad, rtol=3e-5, atol=1e-6)


def test_which_losses_of_trl_take_a_divergence():
    """Ours are those, and one more that TRL does not have."""
    source = inspect.getsource(trl_dpo.DPOTrainer._compute_loss)
    parts = re.split(r'loss_type == "(\w+)"', source)
    theirs = {name for name, body in zip(parts[1::2], parts[2::2], strict=True) if re.search("_scores?\\b", body)}
    assert theirs == {CASES[name][1] for name in OF_DIFFERENCE}
    assert set(losses.option_fields()["f_divergence"].defaults) == {*OF_DIFFERENCE, "safedpo"}


def test_mix():
    """MPO's, which is TRL's own example of `loss_weights`."""
    values, expected_values = log_probs(), log_probs()
    loss = ours("dpo=0.8,bco_pair=0.2,sft=1.0", {}, 3, values)
    expected = theirs("", {}, 3, expected_values, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=EXACT)
    loss.backward()
    expected.backward()
    for own, one in zip(values[:2], expected_values[:2], strict=True):
        torch.testing.assert_close(own.grad, one.grad, rtol=EXACT, atol=EXACT)


def test_every_loss_of_trl_is_compared():
    """But aot and aot_unpaired, which sort over the batch."""
    source = Path(trl_dpo.__file__).read_text("utf-8")
    known = set(re.findall(r'loss_type == "(\w+)"', source))
    assert known - {"aot", "aot_unpaired"} == {name for _, name, _ in CASES.values()}


@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alphapo(alpha):
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="TRL's CPOTrainer has AlphaPO")
    values, expected_values = log_probs(), log_probs()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=alpha,
        beta=BETA,
        label_smoothing=0.0,
        loss_type="simpo",
        simpo_gamma=0.4,
    )
    expected, *_ = cpo.CPOTrainer.cpo_loss(trainer, *expected_values[:2])
    loss = ours("alphapo", {"simpo_gamma": 0.4, "alphapo_alpha": alpha}, 1, values)
    torch.testing.assert_close(loss, expected.mean(), rtol=EXACT, atol=EXACT)
    loss.backward()
    expected.mean().backward()
    for own, one in zip(values[:2], expected_values[:2], strict=True):
        torch.testing.assert_close(own.grad, one.grad, rtol=EXACT, atol=EXACT)
