"""AOT: alignment by optimal transport, which compares distributions over a step's pairs and not its pairs one by one.

    aot             L = -(1 - epsilon) log sigmoid(z) - epsilon log sigmoid(-z),   z = beta (u_(k) - v_(k))

                    u_i = log pi_theta(y_w|x) - log pi_theta(y_l|x),   v_i = log pi_ref(y_w|x) - log pi_ref(y_l|x)

    aot_unpaired    the same of z = beta (Delta_w,(k) - Delta_l,(k))

    x_(k)   = the k-th smallest of its kind among the pairs of the step; a pair's loss is that of its k
    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    epsilon = label_smoothing

One dimension makes it simple: the optimal transport between two samples pairs them in their order, and u stochastically
dominates v where each u_(k) is above v_(k). With `aot` pairs are those of one prompt; with `aot_unpaired` chosen and
rejected answers meet whatever their prompts, which only the marginals decide.

The step, not the microbatch, is what is sorted: all microbatches of all data-parallel ranks, so that a step does not
hang on the layout. What its pairs' log-probs are has to be known before the first of them can have a gradient: a step
has one more forward pass of the policy. TRL sorts the pairs of one microbatch of one process. An evaluation is not
sorted: its loss is that of each pair alone, DPO's.

Source: arXiv 2406.05882, in the form of TRL (logistic loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, label_smoothing, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, required, rewarded


@dataclass(frozen=True)
class AotOptions(LossOptions):
    beta: float = beta()
    label_smoothing: float = label_smoothing()
    nll_weight: float = nll_weight()


def of_equal_rank(own: Tensor, others: Tensor) -> Tensor:
    """[P], [P] -> [P]: for each of the one, the one of the others that has its place in their order."""
    places = torch.argsort(torch.argsort(own, stable=True))
    return others.sort().values[places]


def reference_margins(pairs: PairLogProbs) -> Tensor:
    """v, [P]."""
    return required(pairs.reference_chosen, "reference_chosen") - required(
        pairs.reference_rejected, "reference_rejected"
    )


def paired_targets(pairs: PairLogProbs, options: AotOptions) -> tuple[Tensor, Tensor]:
    """Of all pairs of a step: v_(k) of each, twice."""
    target = of_equal_rank(pairs.policy_chosen - pairs.policy_rejected, reference_margins(pairs))
    return target, target


def unpaired_targets(pairs: PairLogProbs, options: AotOptions) -> tuple[Tensor, Tensor]:
    """Of all pairs of a step: for each chosen answer the rejected one of its rank, and the other way round."""
    chosen, rejected = log_ratios(pairs)
    return of_equal_rank(chosen, rejected), of_equal_rank(rejected, chosen)


def smoothed(z: Tensor, epsilon: float) -> Tensor:
    """cDPO's loss of z, [P]."""
    return -(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z)


def aot(pairs: PairLogProbs, options: AotOptions) -> PairLosses:
    """AOT per pair, [P], in nats; rewards beta Delta_i."""
    margin = pairs.policy_chosen - pairs.policy_rejected
    target = reference_margins(pairs) if pairs.chosen_target is None else pairs.chosen_target
    loss = smoothed(options.beta * (margin - target), options.label_smoothing)
    delta_w, delta_l = log_ratios(pairs)
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


def aot_unpaired(pairs: PairLogProbs, options: AotOptions) -> PairLosses:
    """AOT of the marginals per pair, [P], in nats; rewards beta Delta_i.

    A pair's loss is its chosen answer's; its rejected answer has the gradient that the loss of another pair has in it.
    """
    delta_w, delta_l = log_ratios(pairs)
    if pairs.chosen_target is None:
        loss = smoothed(options.beta * (delta_w - delta_l), options.label_smoothing)
    else:
        above = required(pairs.rejected_target, "rejected_target")
        loss = smoothed(options.beta * (delta_w - pairs.chosen_target), options.label_smoothing)
        of_another = smoothed(options.beta * (above - delta_l), options.label_smoothing)
        loss = loss + (of_another - of_another.detach())
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


PAIRED = LossSpec(
    name="aot",
    function=aot,
    options=AotOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Alignment by optimal transport: a step's margins against the reference's, each in its order",
    source="arXiv 2406.05882",
    elsewhere=("aot_pair",),
    step_targets=paired_targets,
)
UNPAIRED = LossSpec(
    name="aot_unpaired",
    function=aot_unpaired,
    options=AotOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Alignment by optimal transport: a step's chosen answers against its rejected ones, each in its order",
    source="arXiv 2406.05882",
    step_targets=unpaired_targets,
)
