"""What a model makes of its output layer's products x before the softmax: z = c tanh(s x / c), or s x without a cap.

    dz / dx = s (1 - (z / c)^2)

Both are monotone, s being positive: the likeliest token is the same with and without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitShape:
    """Scale s and cap c of the logits; by default they stay as they are."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """The logits, with their gradient."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def in_place(self, products: Tensor) -> Tensor:
        """The logits, where the products were."""
        if self.scale != 1:
            products.mul_(self.scale)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor:
        """(dz / dx) / s, of logits under a cap."""
        assert self.cap is not None
        return 1 - (logits / self.cap).square()
