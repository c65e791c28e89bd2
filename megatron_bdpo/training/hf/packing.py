"""An export of a family whose files do not hold the tensors that its rules name: written anew when all are there.

Such a tensor, gpt-oss's of all experts of a layer for one, is of more ranks than exchange weights with each other. So
it is put together on disk: until the files of the first form are removed, the model is there twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import distributed

from megatron_bdpo.model.hf.checkpoint import INDEX, SINGLE, HuggingFaceCheckpoint
from megatron_bdpo.model.hf.config import Architecture
from megatron_bdpo.model.hf.export import write_file, write_json
from megatron_bdpo.model.hf.file_layout import FILE_BYTES
from megatron_bdpo.training.distributed import is_rank_zero

#: Bytes of a number, by safetensors' names.
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def pack(architecture: Architecture, directory: Path, guard: Callable[[], AbstractContextManager[None]]) -> None:
    """Write a directory's files anew, every rank some of them. Collective; nothing for families without ``pack``.

    Args:
        guard: makes what the operating system refuses on one rank end all of them; collective.
    """
    if architecture.family.pack is None:
        return
    with guard():
        first = HuggingFaceCheckpoint.open(directory)
        packed = architecture.family.pack(first, architecture.weights.sizes)
        files = _files(packed)
        for number, (name, tensors) in enumerate(files.items()):
            if number % distributed.get_world_size() == distributed.get_rank():
                rows = {tensor: packed.rows(tensor, 0, packed.tensors[tensor].shape[0]) for tensor in tensors}
                write_file(directory / f"{name}.packed", rows)
        packed.close()
    with guard():
        if is_rank_zero():
            for file in {stored.file for stored in first.tensors.values()}:
                file.unlink()
            for name in files:
                (directory / f"{name}.packed").rename(directory / name)
            (directory / INDEX).unlink(missing_ok=True)
            if len(files) > 1:
                places = {tensor: name for name, tensors in files.items() for tensor in tensors}
                total = sum(_size(packed, tensor) for tensor in places)
                content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
                write_json(directory / INDEX, content)


def _files(packed: HuggingFaceCheckpoint) -> dict[str, list[str]]:
    """The tensors of each file, layer by layer."""
    parts: list[list[str]] = [[]]
    size = 0
    for tensor in sorted(packed.tensors, key=_in_order):
        own = _size(packed, tensor)
        if parts[-1] and size + own > FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += own
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def _size(packed: HuggingFaceCheckpoint, tensor: str) -> int:
    stored = packed.tensors[tensor]
    return math.prod(stored.shape) * _BYTES[stored.dtype]


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Numbers in a name by their size."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
