"""B-DPO: DPO that pushes the better comprehended response of a pair less.

    z = beta s (w_w Delta_w - w_l Delta_l)
    L = -log sigmoid(z)

    Delta_i  = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response; w chosen, l rejected
    w_w, w_l = 2 softmax(-[I_w, I_l] / tau)      balanced weights (BW); I_i comprehension, tau = bdpo_temperature
    s        = sqrt(2) / ||(w_w, w_l)||_2        scaling factor (SF)

The paper's ablation is the two switches; SF alone computes s from the weights that it does not apply:

    bdpo_weights  bdpo_scale  row
    False         False       DPO       (so is tau = inf, to the bit)
    True          False       DPO + BW
    False         True        DPO + SF
    True          True        B-DPO

I, w and s carry no gradient, so that for every w the gradient in (log pi_theta(y_w|x), log pi_theta(y_l|x)) has norm
sqrt(2) beta sigmoid(-z) under B-DPO: DPO's at the same z.

Source: arXiv 2603.22829. Our reconstruction from its abstract and a published summary: see `comprehension`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.comprehension import balanced_weights, gradient_scale, mutual_information
from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import POSITIVE_OR_INF, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, required, rewarded


@dataclass(frozen=True)
class BdpoOptions(LossOptions):
    beta: float = beta()
    bdpo_temperature: float = option(
        1.0, "temperature of the balanced weights, in the comprehension's unit; inf balances nothing", POSITIVE_OR_INF
    )
    bdpo_weights: bool = option(True, "apply the balanced weights (BW)")
    bdpo_scale: bool = option(True, "apply the scaling factor that keeps the gradient's size (SF)")
    bdpo_comprehension: Literal["per-token", "sum"] = option(
        "per-token", "mutual information of prompt and response: nats per response token, or their sum"
    )
    nll_weight: float = nll_weight()


def requirements(options: BdpoOptions) -> Requirements:
    return Requirements(reference=True, comprehension=options.bdpo_weights or options.bdpo_scale)


def comprehension(pairs: PairLogProbs, options: BdpoOptions) -> tuple[Tensor, Tensor]:
    """(I_w, I_l), each [P], in nats per token or nats."""
    per_token = options.bdpo_comprehension == "per-token"
    i_w = mutual_information(
        required(pairs.reference_chosen, "reference_chosen"),
        required(pairs.unconditional_chosen, "unconditional_chosen"),
        pairs.chosen_tokens,
        per_token,
    )
    i_l = mutual_information(
        required(pairs.reference_rejected, "reference_rejected"),
        required(pairs.unconditional_rejected, "unconditional_rejected"),
        pairs.rejected_tokens,
        per_token,
    )
    return i_w, i_l


def bdpo(pairs: PairLogProbs, options: BdpoOptions) -> PairLosses:
    """B-DPO per pair, [P], in nats; rewards beta Delta_i, without weights, so that runs compare.

    Metrics: `weights/chosen`, `weights/rejected` and `scale` as applied (1 where switched off), and, unless both are
    off, `comprehension/chosen`, `comprehension/rejected` and `comprehension/imbalance` = |I_w - I_l|.
    """
    delta_w, delta_l = log_ratios(pairs)
    w_w = w_l = s = torch.ones_like(delta_w)
    metrics: dict[str, Tensor] = {}
    if requirements(options).comprehension:
        i_w, i_l = comprehension(pairs, options)
        balanced = balanced_weights(i_w, i_l, options.bdpo_temperature)
        if options.bdpo_weights:
            w_w, w_l = balanced
        if options.bdpo_scale:
            s = gradient_scale(*balanced)
        metrics = {
            "comprehension/chosen": i_w,
            "comprehension/rejected": i_l,
            "comprehension/imbalance": (i_w - i_l).abs(),
        }
    z = options.beta * (s * (w_w * delta_w - w_l * delta_l))
    metrics |= {"weights/chosen": w_w, "weights/rejected": w_l, "scale": s}
    return add_nll(rewarded(-logsigmoid(z), options.beta, delta_w, delta_l, metrics), pairs, options.nll_weight)


SPEC = LossSpec(
    name="bdpo",
    function=bdpo,
    options=BdpoOptions,
    requirements=requirements,
    summary="Balanced DPO: weights each response by how well the reference model comprehends it",
    source="arXiv 2603.22829 (reconstruction)",
)
