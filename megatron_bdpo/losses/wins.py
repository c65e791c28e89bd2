"""Whether rewards agree with preferences: the accuracy of pairs, groups and labelled answers."""

from __future__ import annotations

import torch
from torch import Tensor

#: Reward margins closer to zero are rounding, as at the first step, where policy and reference are the same weights.
TIE = 1e-5


def wins(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where it is negative, 1/2 for a tie; of any shape, in the margin's dtype."""
    return torch.where(margin.abs() <= TIE, 0.5, (margin > 0).to(margin.dtype))
