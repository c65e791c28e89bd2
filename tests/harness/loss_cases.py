"""Pairs for losses, and what a loss makes of them beside what its closed form does."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import LossSpec, PairLogProbs, PairLosses
from tests.harness.closed_forms import CLOSED_FORMS, STEP_FORMS, Pair, in_beginnings, with_modifiers

MODIFIERS = {name for name, each in losses.option_fields().items() if each.is_modifier}


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Log-probs on a grid of 1/16, so that fp32 holds them exactly and one oracle serves both dtypes."""
    rng, shares = random.Random(seed), random.Random(f"beginnings {seed}")

    def log_prob(tokens: int) -> float:
        return -round(16 * tokens * rng.uniform(0.05, 5)) / 16 - 1 / 16

    def beginning(log_prob: float, tokens: int, common: int) -> float:
        return log_prob if tokens == common else round(16 * log_prob * shares.uniform(0.1, 0.9)) / 16

    def pair() -> Pair:
        n_w, n_l = rng.choice([1, 2, 7, 60]), rng.choice([1, 3, 50])
        lengths = (n_w, n_l) * 3
        l_w, l_l, r_w, r_l, u_w, u_l = map(log_prob, lengths)
        entropies = (round(16 * n * rng.uniform(0, 4)) / 16 for n in (n_w, n_l))
        known = Pair(l_w, l_l, n_w, n_l, r_w, r_l, u_w, u_l, 0, rng.randint(0, 1), *entropies)
        wholes = zip((l_w, l_l, r_w, r_l), (n_w, n_l) * 2, strict=True)
        return Pair(*known[:12], *(beginning(whole, tokens, min(n_w, n_l)) for whole, tokens in wholes))

    return [pair() for _ in range(count)]


EXTREME = [  # |z| = 1e3 at beta 0.1, one-token responses, policy = reference, probabilities near 1, I near +-1e3
    Pair(-10.0, -10010.0, 1, 1, -10.0, -10.0, -12.0, -11.0, 0, 1),
    Pair(-10010.0, -10.0, 1, 1, -10.0, -10.0, -11.0, -12.0, 0, 1),
    Pair(-3.0, -4.0, 1, 1, -3.0, -4.0, -5.0, -4.5),
    Pair(-(2.0**-16), -(2.0**-18), 1, 1, -1.0, -1.0, -2.0, -3.0),
    Pair(-(2.0**-16), -900.0, 1, 1, -1.0, -800.0, -1001.0, -2.0),
    Pair(-900.0, -(2.0**-16), 1, 1, -800.0, -1.0, -2.0, -1001.0, 0, 1),
]
PAIRS = random_pairs(100) + EXTREME


def inputs(pairs: list[Pair], dtype: torch.dtype) -> PairLogProbs:
    columns = [list(column) for column in zip(*pairs, strict=True)] if pairs else [[]] * len(Pair._fields)
    l_w, l_l, n_w, n_l, r_w, r_l, u_w, u_l, h_w, h_l, c_w, c_l, b_w, b_l, d_w, d_l = columns
    policy = [torch.tensor(column, dtype=dtype, requires_grad=True) for column in (l_w, l_l)]
    tokens = [torch.tensor(column, dtype=torch.int64) for column in (n_w, n_l)]
    frozen = [torch.tensor(column, dtype=dtype) for column in (r_w, r_l, u_w, u_l)]
    unsafe = [torch.tensor(h_w, dtype=torch.bool), torch.tensor(h_l, dtype=torch.int64)]  # either type is allowed
    entropies = [torch.tensor(column, dtype=dtype) for column in (c_w, c_l)]
    beginnings = [torch.tensor(column, dtype=dtype, requires_grad=True) for column in (b_w, b_l)]
    beginnings += [torch.tensor(column, dtype=dtype) for column in (d_w, d_l)]
    return PairLogProbs(*policy, *tokens, *frozen, *unsafe, *entropies, *beginnings)


class Result(NamedTuple):
    """Loss and its gradient in (log pi_theta(y_w|x), log pi_theta(y_l|x))."""

    loss: torch.Tensor
    grad_w: torch.Tensor
    grad_l: torch.Tensor


def with_targets(spec: LossSpec[Any, Any, Any], pairs: PairLogProbs, options: Any) -> PairLogProbs:
    """The pairs as those of one step."""
    if spec.step_targets is None:
        return pairs
    detached = replace(
        pairs, policy_chosen=pairs.policy_chosen.detach(), policy_rejected=pairs.policy_rejected.detach()
    )
    chosen, rejected = spec.step_targets(detached, options)
    return replace(pairs, chosen_target=chosen, rejected_target=rejected)


def evaluate(name: str, given: dict[str, object], pairs: PairLogProbs) -> tuple[Result, PairLosses]:
    spec, options = losses.get(name), losses.build_options(name, given)
    out = spec.function(with_targets(spec, pairs, options), options)
    return Result(out.loss, *torch.autograd.grad(out.loss.sum(), (pairs.policy_chosen, pairs.policy_rejected))), out


def expected(name: str, given: dict[str, object], pairs: list[Pair]) -> Result:
    values = asdict(losses.build_options(name, given))
    if name in STEP_FORMS:
        nll_weight, weighs = values.pop("nll_weight"), values.pop("use_weighting")
        assert not weighs
        rows = [
            (loss - nll_weight * p.l_w / p.n_w, grad_w - nll_weight / p.n_w, grad_l)
            for p, (loss, grad_w, grad_l) in zip(pairs, STEP_FORMS[name](pairs, **values), strict=True)
        ]
    else:
        rows = [with_modifiers(CLOSED_FORMS[name], p, **values) for p in pairs]
    return Result(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def of_beginnings(name: str, given: dict[str, object], pairs: list[Pair]) -> tuple[list[torch.Tensor], ...]:
    """Gradients in the policy's log-probs of the common length, of chosen and rejected, and what they are expected to
    be."""
    full = inputs(pairs, torch.float64)
    spec, options = losses.get(name), losses.build_options(name, given)
    chosen, rejected = full.policy_chosen_beginning, full.policy_rejected_beginning
    assert chosen is not None and rejected is not None
    found = torch.autograd.grad(spec.function(full, options).loss.sum(), [chosen, rejected])
    rows = [in_beginnings(CLOSED_FORMS[name], p, **asdict(options)) for p in pairs]
    return list(found), list(torch.tensor(rows, dtype=torch.float64).unbind(1))
