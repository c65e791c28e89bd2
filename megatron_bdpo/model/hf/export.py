"""Megatron's weights as a Hugging Face model: one whole tensor at a time, from wherever they are.

The sources (``gather`` for a live model, ``stored`` for a checkpoint) yield whole Megatron tensors. Each is cut into
its Hugging Face tensors, which are written as soon as a file is full. The directory gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import CONFIG, INDEX, SINGLE
from megatron_bdpo.model.hf.config import with_dtype
from megatron_bdpo.model.hf.tensors import Place, WeightMap

#: Largest file, unless one tensor alone is larger. Also what an export holds in memory, beside one tensor.
FILE_BYTES = 2 << 30

#: Files of the original that describe the tokenizer, generation and terms of use.
_COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*.jinja", "preprocessor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def split(place: Place, whole: Tensor, weights: WeightMap) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole Megatron tensor; rows that pad the vocabulary are left out.

    Raises:
        UserError: the tensor has fewer rows than these.
    """
    pieces: dict[str, list[Tensor]] = {}
    first = 0
    for part in weights.parts(place):
        length = part.stop - part.start
        pieces.setdefault(part.name, []).append(whole[first : first + length])
        first += length
    if first > len(whole):
        raise UserError(f"{place.key} has {len(whole)} rows, those of its Hugging Face family {first}.")
    return {name: torch.cat(parts) for name, parts in pieces.items()}


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` when the block ends well and vanishes when it does not.

    Raises:
        UserError: ``target`` is there already.
    """
    refuse_existing(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """An export never writes into what is there."""
    if target.exists():
        raise UserError(f"{target} is there already. Remove it, or name another directory.")


@dataclass
class SafetensorsWriter:
    """Writes tensors into files of bounded size, and their index at the end."""

    directory: Path
    file_bytes: int = FILE_BYTES
    dtype: torch.dtype | None = None
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _files: list[list[str]] = field(default_factory=list)
    _written: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, writing a file when they are enough."""
        for name, tensor in tensors.items():
            if self._waiting and self._size() + tensor.nbytes > self.file_bytes:
                self._flush()
            self._waiting[name] = tensor
            self.dtype = self.dtype or tensor.dtype

    def finish(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Write what is left and the index.

        Raises:
            UserError: not all tensors of the architecture have come.
        """
        self._flush()
        missing = expected.keys() - {name for names in self._files for name in names}
        if missing:
            raise UserError(f"the source has no weights for {', '.join(sorted(missing)[:8])}.")
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self.directory / SINGLE)
            return
        places: dict[str, str] = {}
        for index, names in enumerate(self._files):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self.directory / file)
            places |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self._written}, "weight_map": dict(sorted(places.items()))}
        write_json(self.directory / INDEX, content)

    def _size(self) -> int:
        return sum(tensor.nbytes for tensor in self._waiting.values())

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._waiting:
            file = self._part(len(self._files))
            save_file(self._waiting, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors makes files for their owner alone
            self._written += self._size()
            self._files.append(list(self._waiting))
            self._waiting = {}

    def _part(self, index: int) -> Path:
        return self.directory / f"part-{index}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as Hugging Face writes them."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_companions(
    directory: Path, config: Mapping[str, Any], dtype: torch.dtype | None, original: Path | None, card: str
) -> None:
    """Everything beside the weights: configuration, what the original model has of tokenizer and terms, model card."""
    write_json(directory / CONFIG, with_dtype(config, _DTYPE_NAMES[dtype or torch.float32]))
    (directory / "README.md").write_text(card, "utf-8")
    for pattern in _COPIED if original else ():
        for file in original.glob(pattern):  # type: ignore[union-attr]
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
