"""How a linear layer is split over ranks, and with it the work of the adapters beside it.

How the work is split follows the layer, so that no rank holds or moves what is as wide as the hidden states:

    layer     | A        | B        | between A and B           | gradients summed over the layer's ranks
    ----------|----------|----------|---------------------------|-----------------------------------------
    column    | whole    | by rows  | u of all ranks is one     | of u, which makes A's whole
    column SP | whole    | by rows  | u gathered along tokens   | of u (reduce-scatter); of A, by Megatron
    row       | columns  | whole    | u summed                  | none
    row SP    | columns  | whole    | u summed and scattered    | of B and m, by Megatron
    expert    | as above | as above | nothing: Megatron sums    | of what is whole, over its ranks, here
              |          |          | what the experts give     |

u = A x is [tokens, rank]: with SP a thousandth of the hidden states. Megatron sums the gradients of weights that are
marked ``sequence_parallel`` in ``finalize_model_grads``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

COLUMN, ROW = 0, 1
"""Which axis of the layer's weight is split: its outputs or its inputs."""


@dataclass(frozen=True)
class Split:
    """How a linear layer is split over ranks."""

    axis: int
    """``COLUMN`` or ``ROW``."""
    group: Any
    """Process group of the split."""
    sequence_parallel: bool = False
    is_expert: bool = False

    @property
    def is_alone(self) -> bool:
        """One rank has the whole layer."""
        return bool(self.group.size() == 1)

    def drop_out(self, hidden: Tensor, probability: float) -> Tensor:
        """Dropout of the layer's inputs: the same on all ranks where these are, else on each rank another."""
        if self.is_alone or (self.axis == COLUMN and not self.sequence_parallel):
            return functional.dropout(hidden, probability)
        with get_cuda_rng_tracker().fork():
            return functional.dropout(hidden, probability)

    def between(self, low: Tensor) -> Tensor:
        """From A's outputs on this rank to B's inputs; see the table above. Collective."""
        if self.is_alone or self.is_expert:
            return low
        move = {
            (COLUMN, False): copy_to_tensor_model_parallel_region,
            (COLUMN, True): gather_from_sequence_parallel_region,
            (ROW, False): reduce_from_tensor_model_parallel_region,
            (ROW, True): reduce_scatter_to_sequence_parallel_region,
        }[self.axis, self.sequence_parallel]
        moved: Tensor = move(low, group=self.group)
        return moved

    def summed_in_backward(self, weight: nn.Parameter) -> Tensor:
        """A weight, whose gradient is summed where every rank of a split expert has all of it, and sees a part."""
        if self.is_alone or not self.is_expert or weight.tensor_model_parallel:  # type: ignore[attr-defined]
            return weight
        copied: Tensor = copy_to_tensor_model_parallel_region(weight, group=self.group)
        return copied

    def sum_over_inputs(self, values: Tensor) -> Tensor:
        """Sums over this rank's inputs of the layer, as sums over all, in place. Collective."""
        if self.axis == ROW and not self.is_alone:
            torch.distributed.all_reduce(values, group=self.group)
        return values
