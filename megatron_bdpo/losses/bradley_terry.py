"""Bradley-Terry: the loss of a reward model, on its scalar rewards.

    L = -log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2

    r rewards, w chosen, l rejected
    m = the margin that the row asks for, 0 where it asks for none
    c = center_rewards_coefficient: rewards are known but for a constant, and the term keeps them around zero

Source: Bradley and Terry 1952, as in InstructGPT, arXiv 2203.02155, eq. 1; m: Llama 2, arXiv 2307.09288, eq. 2;
c: arXiv 2312.09244, eq. 2, as in TRL.

It is no loss of the registry: those read log-probs. See ``--objective reward``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLosses, Requirements
from megatron_bdpo.losses.options import NON_NEGATIVE, LossOptions, option


@dataclass(frozen=True, eq=False)
class PairRewards:
    """Rewards of P preference pairs, every tensor [P]."""

    chosen: Tensor
    """r_w"""
    rejected: Tensor
    """r_l"""
    margin: Tensor | None = None
    """m; None: of no pair"""


@dataclass(frozen=True)
class BradleyTerryOptions(LossOptions):
    center_rewards_coefficient: float = option(0.0, "weight of (r_w + r_l)^2, which keeps rewards small", NON_NEGATIVE)


def bradley_terry(pairs: PairRewards, options: BradleyTerryOptions) -> PairLosses:
    """The loss per pair, [P], in nats."""
    difference = pairs.chosen - pairs.rejected
    loss = -logsigmoid(difference if pairs.margin is None else difference - pairs.margin)
    total = pairs.chosen + pairs.rejected
    if options.center_rewards_coefficient:
        loss = loss + options.center_rewards_coefficient * total**2
    mean = {"rewards/mean": total.detach() / 2}
    return PairLosses(loss, pairs.chosen.detach(), pairs.rejected.detach(), mean)


SPEC = LossSpec(
    name="bradley_terry",
    function=bradley_terry,
    options=BradleyTerryOptions,
    requirements=lambda options: Requirements(),
    summary="Bradley-Terry on the rewards of a scalar head",
    source="Bradley and Terry 1952; arXiv 2203.02155, eq. 1",
)
