"""The parts of a Hugging Face model on disk: weights, configuration, and what the original has of tokenizer and terms.

The sources (``gather`` for a live model, ``stored`` for a checkpoint) give the whole Megatron tensors of one file after
the other (``files``), which are cut into Hugging Face's here. The directory gets its name when it is complete.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_bdpo.errors import UserError, visible
from megatron_bdpo.model.hf.checkpoint import CONFIG
from megatron_bdpo.model.hf.config import exported
from megatron_bdpo.model.hf.tensors import Place, WeightMap
from megatron_bdpo.user_files import MOST_SIDE_FILE_BYTES, open_regular, why_not_read

#: Files of the original that describe the tokenizer, generation and terms of use.
_COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*.jinja", "preprocessor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def split(place: Place, whole: Tensor, weights: WeightMap) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole Megatron tensor; rows that pad the vocabulary are left out."""
    pieces: dict[str, dict[int, Tensor]] = {}
    first = 0
    for part in weights.parts(place):
        length = part.stop - part.start
        pieces.setdefault(part.name, {})[part.start] = whole[first : first + length]
        first += length
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def refuse_existing(target: Path) -> None:
    """An export never writes into what is there."""
    if target.exists():
        raise UserError(f"{target} is there already. Remove it, or name another directory.")


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # as umask and directory want it; safetensors makes files for their owner alone
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own, for a full disk too
        raise OSError(str(error)) from error
    path.chmod(mode)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as Hugging Face writes them."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_companions(
    directory: Path, config: Mapping[str, Any], dtype: torch.dtype | None, original: Path | None, card: str
) -> None:
    """Everything beside the weights: configuration, what the original model has of tokenizer and terms, model card."""
    write_json(directory / CONFIG, exported(config, _DTYPE_NAMES[dtype or torch.float32]))
    (directory / "README.md").write_text(card, "utf-8")
    if original:
        copy_companions(original, directory)


def copy_companions(original: Path, directory: Path) -> None:
    """What the original has of tokenizer and terms: its own files alone, because an export is published.

    A link that leads out of the original's directory may lead to anything: it is left out, and named.
    """
    for file in sorted({file for pattern in _COPIED for file in original.glob(pattern)}):
        if why := why_not_read(file, original, MOST_SIDE_FILE_BYTES):
            print(visible(f"WARNING: {file} {why}: it is not in the export"), file=sys.stderr, flush=True)
            continue
        with open_regular(file) as source, (directory / file.name).open("wb") as target:
            shutil.copyfileobj(source, target)
