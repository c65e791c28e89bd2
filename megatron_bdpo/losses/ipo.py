"""IPO: regress the margin to a fixed target instead of pushing it to infinity.

    L = (h - 1 / (2 beta))^2,   h = Delta_w / |y_w| - Delta_l / |y_l|      (ipo_length_normalized, as in TRL)
                                h = Delta_w - Delta_l                      (as printed in the paper)

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    beta    = the paper's tau

TRL documents that the paper's authors confirmed the division by |y|, which the paper does not mention.

Source: arXiv 2310.12036, eq. 17.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class IpoOptions(LossOptions):
    beta: float = beta()
    ipo_length_normalized: bool = option(True, "IPO on log-ratios per token; off: on their sums, as in the paper")
    nll_weight: float = nll_weight()


def ipo(pairs: PairLogProbs, options: IpoOptions) -> PairLosses:
    """IPO per pair, [P], in squared nats (per token); rewards beta Delta_i of the sums, as TRL logs them."""
    delta_w, delta_l = log_ratios(pairs)
    if options.ipo_length_normalized:
        h = delta_w / pairs.chosen_tokens - delta_l / pairs.rejected_tokens
    else:
        h = delta_w - delta_l
    loss = (h - 1 / (2 * options.beta)).square()
    return add_nll(rewarded(loss, options.beta, delta_w, delta_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="ipo",
    function=ipo,
    options=IpoOptions,
    requirements=lambda options: Requirements(reference=True, length_normalised=options.ipo_length_normalized),
    summary="Identity Preference Optimization: a squared loss on the margin",
    source="arXiv 2310.12036, eq. 17",
    of_difference=True,
)
