"""Means over a part of a step's pairs or answers, of which some step may have none.

Megatron divides each metric's sum by its count: what travels through Megatron are therefore means over *all*, of each
part's share and of its values times membership. Their quotients, taken at the log interval, are exact where every step
counts equally many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_bdpo.platform.hooks import HOOKS_ONLY

#: The name that a part's share goes by.
SHARE = "pairs"


def part_report(
    values: Mapping[str, Tensor], member: Tensor, parts: Sequence[str], weight: Tensor, count: int
) -> dict[str, Tensor]:
    """Name -> [weighted sum over a part, the weights of all], for Megatron to add up. Q parts of N.

    Args:
        values: by name, [N] each.
        member: [Q, N] which are of each part.
        parts: their names.
        weight: [N] in the step's mean.
        count: the sum of the weights.
    """
    weights = member * weight
    named = {SHARE: torch.ones_like(weight), **values}
    sums = torch.stack([value.detach().to(weight.dtype) for value in named.values()]) @ weights.T.to(weight.dtype)
    of_all = sums.new_full((), count)
    return {
        f"{HOOKS_ONLY}{name}/{part}": torch.stack([sums[row, column], of_all]).float()
        for row, name in enumerate(named)
        for column, part in enumerate(parts)
    }


def public_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics that people see, from the means over all that Megatron has made of :func:`part_report`'s.

    ``NAME/PART`` is the mean over a part, ``pairs/PART`` its share. A part that has none is left out. Other metrics
    stay as they are. Where chosen and rejected answers are parts, their margin is the difference of means, as in TRL.
    """
    result = _within_parts(means)
    chosen, rejected = (result.get(f"rewards/{side}") for side in ("chosen", "rejected"))
    if chosen is not None and rejected is not None:
        result.setdefault("rewards/margins", chosen - rejected)
    return result


def _within_parts(means: Mapping[str, float]) -> dict[str, float]:
    result = {}
    for name, mean in means.items():
        if not name.startswith(HOOKS_ONLY):
            result[name] = mean
            continue
        base, _, part = name.removeprefix(HOOKS_ONLY).rpartition("/")
        share = means[f"{HOOKS_ONLY}{SHARE}/{part}"]
        if share > 0:
            result[f"{base}/{part}"] = share if base == SHARE else mean / share
    return result
