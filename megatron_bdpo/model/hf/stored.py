"""The weights of a torch_dist checkpoint as whole tensors, whatever the layout that wrote it; one layer at a time."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.gather import in_order
from megatron_bdpo.model.hf.tensors import Place, WeightMap, place_of


def stored_weights(directory: Path, weights: WeightMap) -> Iterator[tuple[Place, Tensor]]:
    """Every weight of a checkpoint. Needs a process group of this one process.

    Raises:
        UserError: the checkpoint cannot be read, or is of another architecture.
    """
    layers: dict[tuple[int, ...], list[_Stored]] = defaultdict(list)
    for entry in sorted(_entries(directory, weights), key=lambda entry: in_order(entry.place)):
        layers[(in_order(entry.place)[0], *entry.place.indices[:1])].append(entry)
    for together in layers.values():
        try:
            loaded = dist_checkpointing.load(
                {str(number): entry.to_load() for number, entry in enumerate(together)},
                str(directory),
                validate_access_integrity=False,
            )
        except Exception as error:  # the checkpoint library raises many kinds
            raise UserError(f"the checkpoint {directory} cannot be read: {type(error).__name__}: {error}") from error
        for number, entry in enumerate(together):
            yield entry.place, loaded.pop(str(number))


@dataclass(frozen=True)
class _Stored:
    """A tensor of one layer (and expert), stacked with those of the other layers in the checkpoint."""

    key: str
    leading: tuple[int, ...]
    shape: tuple[int, ...]
    """Of all of them together."""
    dtype: torch.dtype

    @property
    def place(self) -> Place:
        return place_of(self.key, self.leading)

    def to_load(self) -> ShardedTensor:
        """A place in memory for the tensor, described as Megatron wants it."""
        stacked = len(self.leading)
        offsets = [(axis, index, self.shape[axis]) for axis, index in enumerate(self.leading)]
        data = torch.empty(self.shape[stacked:], dtype=self.dtype)
        return ShardedTensor.from_rank_offsets(self.key, data, *offsets, prepend_axis_num=stacked)


def _entries(directory: Path, weights: WeightMap) -> Iterator[_Stored]:
    for key, stored in _metadata(directory).items():
        name = place_of(key, ()).key
        if name in weights.rules:
            stacked = len(stored.global_shape) - weights.matrix_axes(name)
            for leading in itertools.product(*map(range, stored.global_shape[:stacked])):
                yield _Stored(key, leading, tuple(stored.global_shape), stored.dtype)
        elif key.startswith(("decoder.", "embedding.", "output_layer.")):  # others are the optimizer's
            raise UserError(f"the checkpoint {directory} has the weight {key}, which the model's family has not.")


def _metadata(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = dist_checkpointing.load_tensors_metadata(str(directory))
    except Exception as error:  # the checkpoint library raises many kinds
        raise UserError(f"{directory} is no torch_dist checkpoint: {type(error).__name__}: {error}") from error
    return found
