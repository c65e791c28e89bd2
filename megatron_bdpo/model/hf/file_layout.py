"""An export's files, before anything is moved: which rank writes which tensors, and under which name.

Every rank that has parts of a tensor could put it together. The tensors are dealt out among those ranks by size, and
what a rank got is cut into files of bounded size. All ranks work out the same from the same description, so the names,
which count the files, are known before the first one is written.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import SINGLE
from megatron_bdpo.model.hf.tensors import Place, WeightMap

#: Largest file, unless one Megatron tensor alone is larger. Also what a rank holds in memory, beside one tensor.
FILE_BYTES = 2 << 30

#: In the order of a forward pass, so that exported files are read in order.
_BEFORE_LAYERS, _AFTER_LAYERS = "embedding.", ("decoder.final_layernorm.", "output_layer.", "reward_head.")


@dataclass(frozen=True)
class Whole:
    """A Megatron tensor of one layer (and expert), as it is when its parts are together."""

    place: Place
    shape: tuple[int, ...]
    """With the rows that pad the vocabulary."""
    dtype: torch.dtype
    holders: tuple[int, ...] = (0,)
    """The ranks that have parts of it: one of them writes it."""


@dataclass(frozen=True)
class ExportFile:
    """A file, and what comes into it."""

    name: str
    writer: int
    wholes: tuple[Whole, ...]


class Source(Protocol):
    """Where the weights are: on the ranks of a live model, or in a checkpoint."""

    @property
    def wholes(self) -> Sequence[Whole]:
        """All of them, on every rank the same."""

    def together(self, files: Sequence[ExportFile]) -> Iterator[tuple[Place, Tensor]]:
        """Of files of different writers, the tensors of this rank's, whole and on its host. Collective."""


def in_order(place: Place) -> tuple[Any, ...]:
    """Sort key: embeddings, layers, output."""
    stage = 0 if place.key.startswith(_BEFORE_LAYERS) else 2 if place.key.startswith(_AFTER_LAYERS) else 1
    return stage, place.indices, place.key


def lay_out(wholes: Iterable[Whole], weights: WeightMap, file_bytes: int = FILE_BYTES) -> list[ExportFile]:
    """The files of an export, in the order of their names.

    Raises:
        UserError: the tensors are not those of the architecture.
    """
    wholes = list(wholes)
    _refuse_others(wholes, weights)
    dealt = _dealt(wholes, weights).items()
    cut = [(writer, part) for writer, hand in dealt for part in _cut(hand, weights, file_bytes)]
    cut.sort(key=lambda of_writer: in_order(of_writer[1][0].place))
    names = [f"model-{number:05d}-of-{len(cut):05d}.safetensors" for number in range(1, len(cut) + 1)]
    if len(cut) == 1:
        names = [SINGLE]
    return [ExportFile(name, writer, tuple(part)) for name, (writer, part) in zip(names, cut, strict=True)]


def rounds(files: Iterable[ExportFile]) -> list[list[ExportFile]]:
    """The files in the order of their writing: in a round every rank writes one at most, all at the same time."""
    of_writer: dict[int, list[ExportFile]] = defaultdict(list)
    for file in files:
        of_writer[file.writer].append(file)
    return [[file for file in each if file] for each in itertools.zip_longest(*of_writer.values())]


def index(files: Iterable[ExportFile], weights: WeightMap) -> dict[str, Any]:
    """The content of the index: the file of each Hugging Face tensor, and the bytes of all."""
    total = 0
    places: dict[str, str] = {}
    for file in files:
        for whole in file.wholes:
            total += _bytes(whole, weights)
            places |= {part.name: file.name for part in weights.parts(whole.place)}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _refuse_others(wholes: Sequence[Whole], weights: WeightMap) -> None:
    missing = weights.shapes().keys() - {part.name for whole in wholes for part in weights.parts(whole.place)}
    if missing:
        raise UserError(f"the source has no weights for {', '.join(sorted(missing)[:8])}.")
    for whole in wholes:
        rows = _rows(whole, weights)
        if rows > whole.shape[0]:
            key = whole.place.key
            raise UserError(f"{key} has {whole.shape[0]} rows, those of its Hugging Face family {rows}.")


def _dealt(wholes: Sequence[Whole], weights: WeightMap) -> dict[int, list[Whole]]:
    """The largest first, each to that of its holders which has the fewest bytes; in order again then."""
    load: Counter[int] = Counter()
    hands: dict[int, list[Whole]] = defaultdict(list)
    for whole in sorted(wholes, key=lambda whole: (-_bytes(whole, weights), in_order(whole.place))):
        writer = min(whole.holders, key=lambda rank: (load[rank], rank))
        load[writer] += _bytes(whole, weights)
        hands[writer].append(whole)
    return {writer: sorted(hand, key=lambda whole: in_order(whole.place)) for writer, hand in hands.items()}


def _cut(hand: Sequence[Whole], weights: WeightMap, file_bytes: int) -> Iterator[list[Whole]]:
    part: list[Whole] = []
    size = 0
    for whole in hand:
        if part and size + _bytes(whole, weights) > file_bytes:
            yield part
            part, size = [], 0
        part.append(whole)
        size += _bytes(whole, weights)
    yield part


def _rows(whole: Whole, weights: WeightMap) -> int:
    """Those that are Hugging Face's."""
    return sum(part.stop - part.start for part in weights.parts(whole.place))


def _bytes(whole: Whole, weights: WeightMap) -> int:
    """Of its Hugging Face tensors together."""
    return _rows(whole, weights) * math.prod(whole.shape[1:]) * whole.dtype.itemsize
