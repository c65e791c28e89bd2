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

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.comprehension import (
    AUTOMATIC_SHARE,
    automatic_temperature,
    balanced_weights,
    gradient_scale,
    mutual_information,
    quantiles,
)
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import COLDEST, TEMPERATURE, LossOptions, beta, nll_weight, option
from megatron_bdpo.losses.terms import add_nll, log_ratios, required, rewarded


@dataclass(frozen=True)
class BdpoOptions(LossOptions):
    beta: float = beta()
    bdpo_temperature: float | Literal["auto"] = option(
        1.0,
        "temperature of the balanced weights, in the comprehension's unit; inf balances nothing; auto: from the "
        "training pairs, so that nine of ten have weights between 1/2 and 3/2",
        TEMPERATURE,
    )
    bdpo_weights: bool = option(True, "apply the balanced weights (BW)")
    bdpo_scale: bool = option(True, "apply the scaling factor that keeps the gradient's size (SF)")
    bdpo_comprehension: Literal["per-token", "sum"] = option(
        "per-token", "mutual information of prompt and response: nats per response token, or their sum"
    )
    nll_weight: float = nll_weight()


def requirements(options: BdpoOptions) -> Requirements:
    balanced = options.bdpo_weights or options.bdpo_scale
    return Requirements(
        reference=True, comprehension=balanced, all_pairs=balanced and options.bdpo_temperature == "auto"
    )


def settle(pairs: PairLogProbs, options: BdpoOptions) -> tuple[BdpoOptions, str]:
    """`--bdpo-temperature auto` by the rule of `comprehension.automatic_temperature`, and the distribution in a table.

    Raises:
        UserError: auto, and the pairs give no temperature.
    """
    if not requirements(options).comprehension:
        return options, ""
    i_w, i_l = comprehension(pairs, options)
    is_automatic = options.bdpo_temperature == "auto"
    if is_automatic:
        options = replace(options, bdpo_temperature=_automatic(i_w, i_l))
    described = _distribution(i_w, i_l, options)
    if is_automatic and len(i_w) < _FEW:
        described = (
            f"WARNING: --bdpo-temperature auto takes its quantile from {len(i_w)} training pairs, fewer than {_FEW}: "
            f"another few would give another one. Give it a number: 1 is the default.\n{described}"
        )
    return options, described


#: Pairs below which the quantile that auto takes is a matter of a few of them.
_FEW = 30


def _automatic(i_w: Tensor, i_l: Tensor) -> float:
    tau = automatic_temperature(i_w, i_l)
    if not tau > COLDEST:  # NaN too
        raise UserError(
            f"--bdpo-temperature auto: the reference comprehends both responses alike in at least "
            f"{AUTOMATIC_SHARE:.0%} of the {len(i_w)} training pairs, so there is nothing to balance (temperature "
            f"{tau:g}). Are their prompts empty? Use --preference-loss dpo, or give a number."
        )
    return tau


def _distribution(i_w: Tensor, i_l: Tensor, options: BdpoOptions) -> str:
    """Quantiles of the comprehension, and the weights and scale of a pair at each quantile of the imbalance."""
    shares = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    imbalance = quantiles((i_w - i_l).abs(), shares)
    smaller, larger = balanced_weights(imbalance, torch.zeros_like(imbalance), temperature(options))
    rows = {
        "I_w": [f"{value:.4f}" for value in quantiles(i_w, shares)],
        "I_l": [f"{value:.4f}" for value in quantiles(i_l, shares)],
        "|I_w - I_l|": [f"{value:.4f}" for value in imbalance],
        "weights there": [f"{low:.2f}/{high:.2f}" for low, high in zip(smaller, larger, strict=True)],
        "scale there": [f"{value:.4f}" for value in gradient_scale(smaller, larger)],
    }
    unit = "nats per token" if options.bdpo_comprehension == "per-token" else "nats"
    head = "".join(f"{name:>10}" for name in ("5 %", "25 %", "median", "75 %", "95 %", "largest"))
    lines = [f"comprehension of {len(i_w)} training pairs, {unit}; temperature {options.bdpo_temperature:.4g}"]
    lines.append(f"  {'':<14}{head}")
    for name, cells in rows.items():
        lines.append(f"  {name:<14}{''.join(f'{cell:>10}' for cell in cells)}")
    return "\n".join(lines)


def temperature(options: BdpoOptions) -> float:
    if isinstance(options.bdpo_temperature, str):
        raise ValueError("bdpo_temperature is still open: LossSpec.settle gives it a value")
    return options.bdpo_temperature


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
        balanced = balanced_weights(i_w, i_l, temperature(options))
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
    settle=settle,
)
