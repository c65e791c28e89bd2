"""The weights of a torch_dist checkpoint as whole tensors, whatever the layout that wrote it; one file at a time.

Megatron's own loading wants to place every part of a tensor on some rank. torch's reader underneath takes any part.
"""

from __future__ import annotations

import itertools
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
from megatron_bdpo.model.hf.file_layout import ExportFile, Whole
from megatron_bdpo.model.hf.tensors import Place, WeightMap, place_of


class StoredWeights:
    """The weights of a checkpoint; a ``files.Source`` for one process.

    Attributes:
        wholes: as ``files.Source`` has them.
    """

    def __init__(self, directory: Path, weights: WeightMap) -> None:
        """Read the checkpoint's description.

        Raises:
            UserError: the checkpoint cannot be read, or is of another architecture.
        """
        self._directory = directory
        self._reader = FileSystemReader(str(directory))
        metadata = _read_metadata(self._reader, directory)
        self._entries = {entry.place: entry for entry in _entries(metadata, weights, directory)}
        self.wholes = [Whole(place, entry.shape, entry.dtype) for place, entry in self._entries.items()]

    def together(self, files: Sequence[ExportFile]) -> Iterator[tuple[Place, Tensor]]:
        """The tensors of the one file, read at once: torch opens a checkpoint's files anew at every reading.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        (file,) = files
        entries = [self._entries[whole.place] for whole in file.wholes]
        try:
            tensors = _read(self._reader, entries)
        except Exception as error:  # of the file system, of pickle, of torch
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the checkpoint {self._directory} cannot be read: {reason}") from error
        for entry in entries:
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
    def dtype(self) -> torch.dtype:
        return self.whole.properties.dtype

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
    found = {entry.index: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}
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
