"""Reference values on disk: the log-probs of one token store under one reference, with a manifest of what they are.

One safetensors file per store: no pickle, memory-mappable, readable by anything. It is written under a temporary name
and renamed, so a file with the right name is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_bdpo.errors import UserError

FloatArray = npt.NDArray[np.float64]

#: Raised when the meaning of the numbers changes.
FORMAT = "1"


def read(path: Path, manifest: Mapping[str, str]) -> dict[str, FloatArray] | None:
    """Values by name ('conditional', 'unconditional', each [P, 2]), or None if there is no such file.

    Raises:
        UserError: the file belongs to other data or another reference (the differing fields are named), or is damaged.
    """
    if not path.exists():
        return None
    expected = {"format": FORMAT, **manifest}
    try:
        with safe_open(path, framework="numpy") as file:
            found = file.metadata() or {}
            differing = [name for name in expected if found.get(name) != expected[name]]
            if differing:
                raise UserError(_mismatch(path, found, expected, differing))
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"the reference cache {path} is damaged ({error}). Delete it; it will be made again."
        ) from error


def write(path: Path, manifest: Mapping[str, str], values: Mapping[str, FloatArray]) -> None:
    """Write values and manifest; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in values.items()},
            partial,
            {"format": FORMAT, **manifest},
        )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _mismatch(path: Path, found: Mapping[str, str], expected: Mapping[str, str], differing: list[str]) -> str:
    fields = "\n".join(
        f"  {name}: {found.get(name, 'missing')} in the file, {expected[name]} here" for name in differing
    )
    return (
        f"the reference cache {path} belongs to something else:\n{fields}\n"
        "Give another --reference-cache directory, or delete the file to score again."
    )
