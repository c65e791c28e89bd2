"""Supervised fine-tuning on the chosen answers: the baseline of every preference method.

    L = -log pi_theta(y_w|x) / |y_w|

    w chosen, |y| response tokens. A mean over pairs of means over tokens: every pair counts alike, whatever its length

Source: the NLL term of RPO, arXiv 2404.19733, alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions
from megatron_bdpo.losses.terms import add_nll, mean_log_probs, rewarded


@dataclass(frozen=True)
class SftOptions(LossOptions):
    pass


def sft(pairs: PairLogProbs, options: SftOptions) -> PairLosses:
    """NLL per pair, [P], in nats per token; rewards log pi_theta(y_i|x) / |y_i|. The rejected answers only report."""
    mean_w, mean_l = mean_log_probs(pairs)
    nothing = 0 * pairs.policy_rejected  # a gradient of 0 for the rejected answers, not none
    return add_nll(rewarded(nothing, 1.0, mean_w, mean_l), pairs, weight=1.0)


SPEC = LossSpec(
    name="sft",
    function=sft,
    options=SftOptions,
    requirements=lambda options: Requirements(),
    summary="Supervised fine-tuning on the chosen answers",
    source="arXiv 2404.19733, its NLL term",
)
