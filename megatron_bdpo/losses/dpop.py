"""DPO-Positive: DPO that pays for a chosen answer less likely than under the reference.

    L = -log sigmoid(beta (Delta_w - Delta_l - lambda max(0, -Delta_w)))

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    lambda  = dpop_lambda; 0 is DPO

The penalty has its corner at policy = reference, where a run begins. There the sign of rounding decides whether a
pair's gradient in y_w is DPO's or 1 + lambda times that: the first step, and so the run, may differ between layouts.

Source: Smaug, arXiv 2402.13228, eq. 3. The default of 50 is PaddleNLP's (its `llm/alignment/dpo/dpo_argument.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import NON_NEGATIVE, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class DpopOptions(LossOptions):
    beta: float = beta()
    dpop_lambda: float = option(50.0, "DPO-Positive's weight of a chosen answer's lost likelihood", NON_NEGATIVE)
    nll_weight: float = nll_weight()


def dpop(pairs: PairLogProbs, options: DpopOptions) -> PairLosses:
    """DPO-Positive per pair, [P], in nats; rewards beta Delta_i. Metric `penalty`: max(0, -Delta_w)."""
    delta_w, delta_l = log_ratios(pairs)
    penalty = (-delta_w).relu()
    loss = -logsigmoid(options.beta * (delta_w - delta_l - options.dpop_lambda * penalty))
    losses = rewarded(loss, options.beta, delta_w, delta_l, {"penalty": penalty.detach()})
    return add_nll(losses, pairs, options.nll_weight)


SPEC = LossSpec(
    name="dpop",
    function=dpop,
    options=DpopOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="DPO-Positive (Smaug): DPO that keeps the chosen answer as likely as it was",
    source="arXiv 2402.13228, eq. 3",
)
