"""The weights of a torch_dist checkpoint as whole tensors, whatever the layout that wrote it; one layer at a time.

Megatron's own loading wants to place every part of a tensor on some rank. torch's reader underneath takes any part.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.gather import in_order
from megatron_bdpo.model.hf.tensors import Place, WeightMap, place_of


def stored_weights(directory: Path, weights: WeightMap) -> Iterator[tuple[Place, Tensor]]:
    """Every weight of a checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, or is of another architecture.
    """
    reader = FileSystemReader(str(directory))
    metadata = _read_metadata(reader, directory)
    layers: dict[tuple[int, ...], list[_Stored]] = defaultdict(list)
    for entry in sorted(_entries(metadata, weights, directory), key=lambda entry: in_order(entry.place)):
        layers[(in_order(entry.place)[0], *entry.place.indices[:1])].append(entry)
    for together in layers.values():
        try:
            tensors = _read(reader, together)
        except Exception as error:  # of the file system, of pickle, of torch
            raise UserError(f"the checkpoint {directory} cannot be read: {type(error).__name__}: {error}") from error
        for entry in together:
            yield entry.place, tensors.pop(entry.index)


@dataclass(frozen=True)
class _Stored:
    """A tensor of one layer (and expert), stacked with those of the other layers in the checkpoint."""

    key: str
    leading: tuple[int, ...]
    whole: TensorStorageMetadata
    """All that are stacked together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own."""
        return tuple(self.whole.size[len(self.leading) :])

    @property
    def place(self) -> Place:
        return place_of(self.key, self.leading)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it is among those it is stacked with."""
        offsets = (*self.leading, *(0 for _ in self.shape))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size((*(1 for _ in self.leading), *self.shape)))

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, self.chunk.offsets)


class _IntoTensors(DefaultLoadPlanner):
    """Reads into given tensors instead of into those of a state dict."""

    def __init__(self, targets: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.targets[index]


def _read(reader: FileSystemReader, entries: Sequence[_Stored]) -> dict[MetadataIndex, Tensor]:
    found = {entry.index: torch.empty(entry.shape, dtype=entry.whole.properties.dtype) for entry in entries}
    items = [
        item for entry in entries for item in create_read_items_for_chunk_list(entry.key, entry.whole, [entry.chunk])
    ]
    targets = {entry.index: found[entry.index].view(entry.chunk.sizes) for entry in entries}
    reader.read_data(LoadPlan(items), _IntoTensors(targets)).wait()
    return found


def _read_metadata(reader: FileSystemReader, directory: Path) -> Metadata:
    try:
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
    except Exception as error:  # of the file system, of pickle
        raise UserError(f"{directory} is no torch_dist checkpoint: {type(error).__name__}: {error}") from error
    return metadata


def _entries(metadata: Metadata, weights: WeightMap, directory: Path) -> Iterator[_Stored]:
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        name = place_of(key, ()).key
        if name in weights.rules:
            stacked = len(stored.size) - weights.matrix_axes(name)
            for leading in itertools.product(*map(range, stored.size[:stacked])):
                yield _Stored(key, leading, stored)
        elif key.startswith(("decoder.", "embedding.", "output_layer.")):  # others are the optimizer's
            raise UserError(f"the checkpoint {directory} has the weight {key}, which the model's family has not.")
