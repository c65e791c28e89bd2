"""Tokenized pairs on disk, memory-mapped: a million pairs open in no time and cost no memory.

A store is a directory, written once and never changed:

    tokens.bin   int32  [N]     prompt, chosen, rejected of pair 0, then of pair 1, ...
    starts.bin   int64  [P]     where each pair begins in tokens.bin
    lengths.bin  int32  [P, 3]  tokens of prompt, chosen, rejected
    source.bin   int16  [P]     index of the source the pair comes from
    row.bin      int64  [P]     its row there, counted from 1
    unsafe.bin   int8   [P, 2]  safety of chosen, rejected: 0 safe, 1 unsafe, -1 unknown
    meta.json                   shapes, sizes, checksums, fingerprint, report; written last

The arrays are raw and little-endian: nothing is pickled, and a file's size alone shows that it was cut short.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec, describe_row
from megatron_bdpo.data.tokenization import PairTokens, TokenArray
from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import is_count, is_number, parse_json, schema_error

FORMAT_NAME = "megatron_bdpo pair store"
FORMAT_VERSION = 3
UNKNOWN, SAFE, UNSAFE = -1, 0, 1

_META = "meta.json"
_TOKENS = "tokens"
# Name -> dtype and columns; the rows of all but the tokens are pairs.
_ARRAYS: dict[str, tuple[str, int | None]] = {
    _TOKENS: ("<i4", None),
    "starts": ("<i8", None),
    "lengths": ("<i4", 3),
    "source": ("<i2", None),
    "row": ("<i8", None),
    "unsafe": ("<i1", 2),
}


@dataclass(frozen=True)
class StoreInfo:
    """What a store says about itself besides its arrays.

    Attributes:
        fingerprint: hex SHA-256 of everything that decides the tokens: data, tokenizer, limits, rules.
        settings: everything that decides the tokens but the number of pairs, by name: digests of the data sets,
            tokenizer, chat template, limits. Stores of the same settings hold the same pairs, as far as both go.
        empty_prompt: token ids of the prompt that says nothing.
        sources: the data sets, in the order of the ``source`` array's indices.
        report: what became of their rows.
    """

    fingerprint: str
    settings: dict[str, Any]
    empty_prompt: list[int]
    sources: tuple[SourceSpec, ...]
    report: DataReport


class PairStore:
    """Read access to a store. All arrays are read-only memory maps. P pairs.

    Attributes:
        directory: where it lies.
        lengths: int32 [P, 3], tokens of prompt, chosen, rejected.
        source: int16 [P], index into ``sources``.
        row: int64 [P], row or line in that source, counted from 1.
        unsafe: int8 [P, 2], safety of chosen and rejected: 0 safe, 1 unsafe, -1 unknown.
        empty_prompt: int32 [length], the prompt of the unconditional log-probability.
        sources: the data sets with the weights of this run.
        fingerprint: hex digest of everything that decides the tokens.
        report: what became of the rows.
    """

    def __init__(self, directory: Path, info: StoreInfo, arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.directory = directory
        self.info = info
        self.sources = info.sources
        self.fingerprint = info.fingerprint
        self.report = info.report
        self.empty_prompt: TokenArray = np.array(info.empty_prompt, dtype=np.int32)
        self.lengths: npt.NDArray[np.int32] = arrays["lengths"]
        self.source: npt.NDArray[np.int16] = arrays["source"]
        self.row: npt.NDArray[np.int64] = arrays["row"]
        self.unsafe: npt.NDArray[np.int8] = arrays["unsafe"]
        self._tokens: TokenArray = arrays[_TOKENS]
        self._starts: npt.NDArray[np.int64] = arrays["starts"]

    @classmethod
    def open(cls, directory: Path | str, sources: tuple[SourceSpec, ...] | None = None) -> PairStore:
        """Open a store; only the small files are read.

        Args:
            directory: the store.
            sources: this run's names and weights of the same data, in the same order; None takes the stored ones.

        Raises:
            UserError: it is no store, of another version, cut short or damaged.
        """
        directory = Path(directory)
        meta = _read_meta(directory)
        try:
            info = StoreInfo(
                fingerprint=meta["fingerprint"],
                settings=meta["settings"],
                empty_prompt=meta["empty_prompt"],
                sources=sources or tuple(SourceSpec(each["path"], each["weight"]) for each in meta["sources"]),
                report=DataReport.from_json(meta["report"]),
            )
        except ValueError as error:
            raise _damaged(directory, f"{_META}: {error}") from error
        arrays = {name: _open_array(directory, name, meta["arrays"][name]) for name in _ARRAYS}
        _check_consistency(directory, info, arrays)
        return cls(directory, info, arrays)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.lengths)

    def pair(self, index: int) -> PairTokens:
        """Token ids of one pair: views of the memory map, not copies.

        Raises:
            IndexError: no such pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of a store of {len(self)} pairs")
        prompt, chosen, rejected = (int(length) for length in self.lengths[index])
        start = int(self._starts[index])
        tokens = self._tokens[start : start + prompt + chosen + rejected]
        return PairTokens(tokens[:prompt], tokens[prompt : prompt + chosen], tokens[prompt + chosen :])

    def describe(self, index: int) -> str:
        """Where a pair comes from, in words for a message: ``pairs.jsonl, line 17``."""
        return describe_row(self.sources[self.source[index]], int(self.row[index]))

    def verify(self) -> None:
        """Read all tokens and compare their checksum. Opening checks everything else.

        Raises:
            UserError: the tokens are damaged.
        """
        expected = _read_meta(self.directory)["arrays"][_TOKENS]["crc32"]
        if _crc32(self._tokens) != expected:
            raise _damaged(self.directory, "the checksum of tokens.bin is wrong")


class PairStoreWriter:
    """Writes a new store, pair by pair; tokens go to disk as they come, 31 bytes per pair stay in memory.

    A context manager that closes the file; `finish` makes the store complete. Without it there is no meta.json, and
    nothing that `PairStore.open` would take for a store.

    Args:
        directory: an existing, empty directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokens: BinaryIO = _array_path(directory, _TOKENS).open("wb", buffering=1 << 20)
        self._crc32 = 0
        self._written = 0  # tokens
        self._columns = {name: array(_TYPECODES[_ARRAYS[name][0]]) for name in _ARRAYS if name != _TOKENS}

    def __enter__(self) -> PairStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tokens.close()

    def __len__(self) -> int:
        """Number of pairs so far."""
        return len(self._columns["starts"])

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Lengths so far, int32 [P, 3]."""
        return np.array(self._columns["lengths"], dtype=np.int32).reshape(-1, 3)

    def append(self, pair: PairTokens, source: int, row: int, record: PreferenceRecord) -> None:
        """Add one pair; of the record only the safety labels are kept."""
        for part in pair:
            data = part.astype("<i4", copy=False).tobytes()
            self._tokens.write(data)
            self._crc32 = zlib.crc32(data, self._crc32)
        lengths = [len(part) for part in pair]
        self._columns["starts"].append(self._written)
        self._columns["lengths"].extend(lengths)
        self._columns["source"].append(source)
        self._columns["row"].append(row)
        self._columns["unsafe"].extend(_label(safe) for safe in (record.chosen_safe, record.rejected_safe))
        self._written += sum(lengths)

    def finish(self, info: StoreInfo) -> None:
        """Write everything but the tokens, flush it all to disk, and write meta.json last."""
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        arrays = {_TOKENS: {"rows": self._written, "crc32": self._crc32}}
        for name, column in self._columns.items():
            if sys.byteorder == "big":
                column.byteswap()
            data = column.tobytes()
            write_whole(_array_path(self._directory, name), data)
            arrays[name] = {"rows": len(column) // (_ARRAYS[name][1] or 1), "crc32": zlib.crc32(data)}
        meta = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "fingerprint": info.fingerprint,
            "settings": info.settings,
            "empty_prompt": info.empty_prompt,
            "sources": [dataclasses.asdict(source) for source in info.sources],
            "report": info.report.to_json(),
            "arrays": arrays,
        }
        write_whole(self._directory / _META, json.dumps(meta, indent=1).encode())


_META_SHAPE = {
    "fingerprint": str,
    "settings": dict,
    "empty_prompt": [lambda token: is_count(token) and token < 2**31],
    "sources": [{"path": str, "weight": is_number}],
    "report": dict,
    "arrays": {name: {"rows": is_count, "crc32": is_count} for name in _ARRAYS},
}

# struct-like type codes of `array`, which is compact where a Python list is not.
_TYPECODES = {"<i1": "b", "<i2": "h", "<i4": "i", "<i8": "q"}


def _label(safe: bool | None) -> int:
    return UNKNOWN if safe is None else SAFE if safe else UNSAFE


def _array_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"


def _damaged(directory: Path, what: str) -> UserError:
    return UserError(f"The pair store {directory} is damaged: {what}. Delete the directory; it is built anew.")


def _read_meta(directory: Path) -> dict[str, Any]:
    """meta.json, checked to be of a store and of this version."""
    path = directory / _META
    try:
        meta = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{directory} is no pair store: it has no {_META}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise _damaged(directory, f"{_META} is no JSON ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT_NAME:
        raise UserError(f"{directory} is no pair store: its {_META} was written by something else.")
    if meta.get("version") != FORMAT_VERSION:
        raise UserError(
            f"The pair store {directory} has format version {meta.get('version')}, this program reads version "
            f"{FORMAT_VERSION}. Delete the directory; it is built anew."
        )
    if wrong := schema_error(meta, _META_SHAPE):
        raise _damaged(directory, f"in {_META}, {wrong}")
    return meta


def _open_array(directory: Path, name: str, described: dict[str, int]) -> npt.NDArray[Any]:
    """Map one array after checking its size and, for all but the tokens, its checksum."""
    dtype, columns = _ARRAYS[name]
    path = _array_path(directory, name)
    shape = (described["rows"],) if columns is None else (described["rows"], columns)
    expected_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        found_bytes = path.stat().st_size
        if found_bytes != expected_bytes or not expected_bytes:
            raise _damaged(directory, f"{path.name} has {found_bytes} bytes instead of {expected_bytes}")
        mapped = np.memmap(path, dtype=dtype, mode="r", shape=shape)
    except OSError as error:
        raise _damaged(directory, f"{path.name} cannot be read ({error.strerror or error})") from error
    if name != _TOKENS and _crc32(mapped) != described["crc32"]:
        raise _damaged(directory, f"the checksum of {path.name} is wrong")
    # Plain ndarray views of the map: np.memmap's own subclass makes every slice several times slower.
    return mapped.view(np.ndarray)


def _check_consistency(directory: Path, info: StoreInfo, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """The arrays fit each other: one row per pair, and the lengths add up to the tokens. And they fit the sources."""
    pairs = len(arrays["lengths"])
    if any(len(values) != pairs for name, values in arrays.items() if name != _TOKENS):
        raise _damaged(directory, "its arrays are of different numbers of pairs")
    if int(arrays["lengths"].sum(dtype=np.int64)) != len(arrays[_TOKENS]):
        raise _damaged(directory, "the lengths do not add up to the number of tokens")
    if not info.empty_prompt:
        raise _damaged(directory, f"{_META} has no empty prompt")
    if int(arrays["source"].max(initial=-1)) >= len(info.sources):
        raise _damaged(directory, "pairs are of more sources than it names")


def _crc32(values: npt.NDArray[Any]) -> int:
    return zlib.crc32(memoryview(np.ascontiguousarray(values)).cast("B"))
