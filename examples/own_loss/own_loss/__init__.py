"""The exponential loss of boosting on DPO's margin: L = exp(min(-beta (Delta_w - Delta_l), cap))."""

from dataclasses import dataclass

import torch

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import POSITIVE, LossOptions, beta, option
from megatron_bdpo.losses.terms import log_ratios, rewarded


@dataclass(frozen=True)
class ExponentialOptions(LossOptions):
    beta: float = beta()
    exponential_cap: float = option(5.0, "largest exponent: pairs beyond it push no further", POSITIVE)


def exponential(pairs: PairLogProbs, options: ExponentialOptions) -> PairLosses:
    """Per pair, [P]."""
    delta_w, delta_l = log_ratios(pairs)
    exponent = -options.beta * (delta_w - delta_l)
    loss = torch.exp(exponent.clamp(max=options.exponential_cap))
    return rewarded(loss, options.beta, delta_w, delta_l)


SPEC = LossSpec(
    name="exponential",
    function=exponential,
    options=ExponentialOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="exponential loss on DPO's margin",
    source="an example",
)
