"""A directory of safetensors files, read row by row: no tensor is read that is not asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import Each, parse_json, schema_error
from megatron_bdpo.user_files import MOST_HEADER_BYTES, open_regular, read_regular, why_not_read

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: Data types of weights, by safetensors' names. Others are quantised.
_DTYPES = ("F64", "F32", "BF16", "F16")

_SHOWN = 8  # names in one message
_ANY_SIZE = 2**63


class StoredTensor(NamedTuple):
    """Where a tensor is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        UserError: there is none.
    """
    try:
        content = parse_json(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


@dataclass
class HuggingFaceCheckpoint:
    """The weights of a Hugging Face model on disk. One file is open at a time, so that one is mapped at a time."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    _open_file: Path | None = None
    _opened: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, directory: Path) -> HuggingFaceCheckpoint:
        """Read the index and the files' headers.

        Raises:
            UserError: a file is missing, truncated or no safetensors file.
        """
        tensors: dict[str, StoredTensor] = {}
        for file in _files(directory):
            tensors |= _read_header(file)
        return cls(directory, tensors)

    @classmethod
    def of_file(cls, file: Path) -> HuggingFaceCheckpoint:
        """The tensors of one file.

        Raises:
            UserError: it is missing, truncated or no safetensors file.
        """
        return cls(file.parent, _read_header(_own(file)))

    def check(
        self, expected: Mapping[str, tuple[int, ...]], described_by: str = CONFIG, left_out: tuple[str, ...] = ()
    ) -> None:
        """Compare names, shapes and data types with those of the architecture.

        Args:
            described_by: the file that says which there should be.
            left_out: how the names of others begin that may be there.

        Raises:
            UserError: naming what differs.
        """
        problems = [
            *_listed("missing", expected.keys() - self.tensors.keys()),
            *_listed(
                "unexpected",
                (
                    name
                    for name in self.tensors.keys() - expected.keys()
                    if not (_is_buffer(name) or name.startswith(left_out))
                ),
            ),
            *_listed(
                "of another shape",
                (
                    f"{name} {list(self.tensors[name].shape)} instead of {list(shape)}"
                    for name, shape in expected.items()
                    if name in self.tensors and self.tensors[name].shape != shape
                ),
            ),
            *_listed(
                "of a data type that holds no weights",
                (
                    f"{name} {self.tensors[name].dtype}"
                    for name in expected.keys() & self.tensors.keys()
                    if self.tensors[name].dtype not in _DTYPES
                ),
            ),
        ]
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            where = f"the weights in {self.directory}"
            raise UserError(f"{where} are not those that its {described_by} describes:\n{listed}")

    def rows(self, name: str, start: int, stop: int, columns: tuple[slice, ...] = ()) -> Tensor:
        """Rows of a tensor, and of these only some columns."""
        stored = self.tensors[name]
        try:
            part: Tensor = self._file(stored.file).get_slice(name)[(slice(start, stop), *columns)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{name} in {stored.file} cannot be read: {error}") from error
        return part

    def close(self) -> None:
        """Let go of the file that was read last."""
        self._open_file = self._opened = None

    def _file(self, path: Path) -> Any:
        if path != self._open_file:
            self.close()
            self._opened, self._open_file = safe_open(path, framework="pt"), path
        return self._opened


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        content = read_json(_own(index))
        if wrong := schema_error(content, {"weight_map": Each(_is_file_name)}):
            raise UserError(f"{index} names no files: {wrong}.")
        return [_own(directory / name) for name in sorted(set(content["weight_map"].values()))]
    if (directory / SINGLE).is_file():
        return [_own(directory / SINGLE)]
    others = sorted(path.name for path in [*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    found = f" There are {', '.join(others[:_SHOWN])}." if others else ""
    raise UserError(
        f"{directory} has neither {SINGLE} nor {INDEX}.{found} Weights are read from safetensors files. Of others "
        "that you trust, transformers' from_pretrained and save_pretrained make these."
    )


def _is_file_name(value: Any) -> bool:
    """Of a file in the directory itself: a path may lead out of it."""
    return isinstance(value, str) and "\0" not in value and value not in ("", ".", "..") and "/" not in value


def _own(path: Path) -> Path:
    """The path of a file of weights or of their index, which has to be a regular one of its directory.

    Raises:
        UserError: it is something else.
    """
    try:
        why = why_not_read(path, path.parent, most=_ANY_SIZE) if path.exists() else ""
    except (OSError, UnicodeEncodeError):  # too long, or half a surrogate pair: told where it is opened
        return path
    if why:
        raise UserError(f"{path} {why}. Weights are regular files in their model's directory: put a copy there.")
    return path


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, from its header. safetensors compares it with the file's size."""
    try:
        _refuse_large_header(path)
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: StoredTensor(path, tensor.get_dtype(), tuple(tensor.get_shape()))
                for name, tensor in stored.items()
            }
    except UnicodeEncodeError as error:  # the index spells half a surrogate pair
        raise UserError(f"{str(path)!a} cannot be the name of a file: {error.reason}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file, or truncated: {error}. Fetch the file again.") from error


def _refuse_large_header(path: Path) -> None:
    """Before the library, which would wait for ever for a file that is a FIFO."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER_BYTES:
        raise SafetensorError(f"its header has {length:,} bytes, and the format allows {MOST_HEADER_BYTES:,}")


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what}: {', '.join(found[:_SHOWN])}{more}"]


def _is_buffer(name: str) -> bool:
    """Old releases wrote the rotary frequencies, which are computed, with the weights."""
    return name.endswith(".rotary_emb.inv_freq")
