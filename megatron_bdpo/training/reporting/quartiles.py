"""Metrics by quartile of the pairs' imbalance |I_w - I_l|: whether the pairs that B-DPO is about are learned otherwise.

The quartiles are the training pairs', fixed before the first step from the precomputed reference values; held-out pairs
are sorted into the same ones. A resident reference knows its values only step by step, so there are none then.

A quartile may have no pair in some step, and Megatron divides each metric's sum by its count: what travels through
Megatron are therefore means over *all* pairs, of each quartile's share and of its values times membership. Their
quotients, taken at the log interval, are exact where every step counts equally many pairs or groups.

The cost: a [4, P] by [P, 4] product per pack, and 16 more [sum, count] entries for Megatron to all-reduce per step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bdpo.platform.hooks import HOOKS_ONLY

#: The metric of a loss that the quartiles are of.
IMBALANCE = "comprehension/imbalance"
QUARTILES = 4
_SHARE = "pairs"


def quartile_edges(imbalance: npt.NDArray[np.float64]) -> Tensor:
    """The three inner edges, [3] float64, of the imbalances [P] of the training pairs."""
    return torch.from_numpy(np.quantile(imbalance, np.arange(1, QUARTILES) / QUARTILES))


def quartile_report(
    values: Mapping[str, Tensor], imbalance: Tensor, edges: Tensor, weight: Tensor, count: int
) -> dict[str, Tensor]:
    """Name -> [weighted sum over the quartile's pairs, the weights of all pairs], for Megatron to add up. P pairs.

    Args:
        values: by name, [P] each.
        imbalance: [P]; a pair on an edge belongs to the lower quartile.
        edges: [3], on the same device.
        weight: [P] of the pairs in the step's mean.
        count: the sum of the weights.
    """
    quartile = torch.bucketize(imbalance.detach(), edges.to(imbalance.dtype))
    member = (quartile[:, None] == torch.arange(QUARTILES, device=imbalance.device)) * weight[:, None]
    named = {_SHARE: torch.ones_like(imbalance), **values}
    sums = torch.stack([value.detach().to(imbalance.dtype) for value in named.values()]) @ member.to(imbalance.dtype)
    pairs = sums.new_full((), count)
    return {
        f"{HOOKS_ONLY}{name}/imbalance_q{q + 1}": torch.stack([sums[row, q], pairs]).float()
        for row, name in enumerate(named)
        for q in range(QUARTILES)
    }


def within_quartiles(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics that people see, from the means over all pairs that Megatron has made of ``quartile_report``'s.

    ``loss/imbalance_q1`` and so on are means over the quartile's pairs, ``pairs/imbalance_q1`` its share of the pairs.
    A quartile without pairs is left out. Other metrics stay as they are.
    """
    result = {}
    for name, mean in means.items():
        if not name.startswith(HOOKS_ONLY):
            result[name] = mean
            continue
        base, _, quartile = name.removeprefix(HOOKS_ONLY).rpartition("/")
        share = means[f"{HOOKS_ONLY}{_SHARE}/{quartile}"]
        if share > 0:
            result[f"{base}/{quartile}"] = share if base == _SHARE else mean / share
    return result


def is_of_a_quartile(name: str) -> bool:
    """Whether a metric's public name is one of ``within_quartiles``."""
    return "/imbalance_q" in name
