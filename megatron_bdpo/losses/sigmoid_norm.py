"""Length-normalised DPO: DPO on log-ratios per token, as Tulu 3 and OLMo 2 train with it.

    L = -log sigmoid(beta (Delta_w / |y_w| - Delta_l / |y_l|))

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    |y_i|   = response tokens

Source: Tulu 3, arXiv 2411.15124, section 5. The default beta of 5 is its own (table 20, and `--dpo_loss_type dpo_norm
--dpo_beta 5` in `docs/tulu3.md` of allenai/open-instruct); TRL's is 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import LossOptions, beta, nll_weight
from megatron_bdpo.losses.terms import add_nll, log_ratios, rewarded


@dataclass(frozen=True)
class SigmoidNormOptions(LossOptions):
    beta: float = beta(5.0)
    nll_weight: float = nll_weight()


def sigmoid_norm(pairs: PairLogProbs, options: SigmoidNormOptions) -> PairLosses:
    """Length-normalised DPO per pair, [P], in nats; rewards beta Delta_i / |y_i|, which it compares."""
    delta_w, delta_l = log_ratios(pairs)
    mean_w, mean_l = delta_w / pairs.chosen_tokens, delta_l / pairs.rejected_tokens
    loss = -logsigmoid(options.beta * (mean_w - mean_l))
    return add_nll(rewarded(loss, options.beta, mean_w, mean_l), pairs, options.nll_weight)


SPEC = LossSpec(
    name="sigmoid_norm",
    function=sigmoid_norm,
    options=SigmoidNormOptions,
    requirements=lambda options: Requirements(reference=True, length_normalised=True),
    summary="Length-normalised DPO (Tulu 3, OLMo 2): log-ratios per token",
    source="arXiv 2411.15124",
    of_difference=True,
)
