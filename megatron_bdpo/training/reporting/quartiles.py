"""Metrics by quartile of the pairs' imbalance |I_w - I_l|: whether the pairs that B-DPO is about are learned otherwise.

The quartiles are the training pairs', fixed before the first step from the precomputed reference values; held-out pairs
are sorted into the same ones. A resident reference knows its values only step by step, so there are none then.

The cost: a [4, P] by [P, 4] product per pack, and 16 more [sum, count] entries for Megatron to all-reduce per step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bdpo.training.reporting.part_means import part_report

#: The metric of a loss that the quartiles are of.
IMBALANCE = "comprehension/imbalance"
QUARTILES = 4


def quartile_edges(imbalance: npt.NDArray[np.float64]) -> Tensor:
    """The three inner edges, [3] float64, of the imbalances [P] of the training pairs."""
    return torch.from_numpy(np.quantile(imbalance, np.arange(1, QUARTILES) / QUARTILES))


def quartile_report(
    values: Mapping[str, Tensor], imbalance: Tensor, edges: Tensor, weight: Tensor, count: int
) -> dict[str, Tensor]:
    """See ``part_report``: ``loss/imbalance_q1`` and so on, ``pairs/imbalance_q1`` the quartile's share. P pairs.

    Args:
        values: by name, [P] each.
        imbalance: [P]; a pair on an edge belongs to the lower quartile.
        edges: [3], on the same device.
        weight: [P] of the pairs in the step's mean.
        count: the sum of the weights.
    """
    quartile = torch.bucketize(imbalance.detach(), edges.to(imbalance.dtype))
    member = quartile == torch.arange(QUARTILES, device=imbalance.device)[:, None]
    return part_report(values, member, [f"imbalance_q{q + 1}" for q in range(QUARTILES)], weight, count)


def is_of_a_quartile(name: str) -> bool:
    """Whether a metric's public name is that of a quartile."""
    return "/imbalance_q" in name
