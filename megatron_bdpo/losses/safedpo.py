"""SafeDPO: DPO with a margin on pairs of a safe and an unsafe response.

    L = -log sigmoid(beta (Delta_w - Delta_l) - (h_l - h_w) delta)

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    h_i     = 1 where response i is unsafe, else 0
    delta   = safedpo_delta >= 0 (the paper's Delta), in the unit of the rewards beta Delta_i

The pairs have been through the paper's data transformation: chosen unsafe and rejected safe are swapped, pairs unsafe
both ways are dropped (`select`). So h_l - h_w is 0 or 1, which the loss itself does not check.

Source: arXiv 2505.20065, eq. 12, with the transformation of eq. 11. The authors have published no code, and of the
paper's text we have none: the equations, and the default delta of 10 with beta 0.1, are as two published notes on it
have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import BoolArray, LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import NON_NEGATIVE, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, required, rewarded


@dataclass(frozen=True)
class SafeDpoOptions(LossOptions):
    beta: float = beta()
    safedpo_delta: float = option(10.0, "SafeDPO's margin between a safe and an unsafe response", NON_NEGATIVE)
    nll_weight: float = nll_weight()


def safedpo(pairs: PairLogProbs, options: SafeDpoOptions) -> PairLosses:
    """SafeDPO per pair, [P], in nats; rewards beta Delta_i, without the margin."""
    delta_w, delta_l = log_ratios(pairs)
    h_w = required(pairs.chosen_unsafe, "chosen_unsafe").to(delta_w.dtype)
    h_l = required(pairs.rejected_unsafe, "rejected_unsafe").to(delta_l.dtype)
    loss = -logsigmoid(options.beta * (delta_w - delta_l) - (h_l - h_w) * options.safedpo_delta)
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


def select(labels: npt.NDArray[np.int8]) -> tuple[BoolArray, BoolArray]:
    """The data transformation: which pairs to keep, and which to swap, by their labels [P, 2]; all are known."""
    chosen_unsafe, rejected_unsafe = (labels == 1).T
    return ~(chosen_unsafe & rejected_unsafe), chosen_unsafe & ~rejected_unsafe


SPEC = LossSpec(
    name="safedpo",
    function=safedpo,
    options=SafeDpoOptions,
    requirements=lambda options: Requirements(reference=True, safety=True),
    summary="SafeDPO: DPO with a margin between safe and unsafe responses",
    source="arXiv 2505.20065, eq. 12",
    select=select,
    of_difference=True,
)
