"""Tokenized pairs on disk, memory-mapped: a million pairs open in no time and cost no memory.

A store is a directory, written once and never changed:

    tokens.bin       int32  [N]     prompts and answers, each once in its group
    starts.bin       int64  [P, 3]  where prompt, chosen, rejected of each pair begin in tokens.bin
    lengths.bin      int32  [P, 3]  tokens of prompt, chosen, rejected
    source.bin       int16  [P]     index of the source the pair comes from
    row.bin          int64  [P]     its row there, counted from 1
    unsafe.bin       int8   [P, 2]  safety of chosen, rejected: 0 safe, 1 unsafe, -1 unknown
    label.bin        int8   [P]     of a labelled answer: 1 desirable, 0 undesirable, 2 not judged; -1: it is a pair
    reference.bin    fp64   [P, 2]  log-probs of chosen, rejected that the rows bring, NaN: none; empty if none does
    margin.bin       fp64   [P]     margin of rewards that the rows ask for, NaN: none; empty if none does
    score.bin        fp64   [P, 2]  a judge's of chosen, rejected, NaN: none; empty if none has any
    context.bin      int64  [S, 2]  stretches of tokens.bin that belong to responses and are not scored, in order
    prompt_of.bin    int32  [P]     index of the pair's own unconditional prompt; -1: the one in meta.json
    own_prompts.bin  int32  [E]     those prompts, one after the other
    own_lengths.bin  int32  [D]     tokens of each
    meta.json                       shapes, sizes, checksums, fingerprint, report; written last

A *group* is the pairs of one row with the same prompt: they lie beside each other, and have one start of their prompts.
An answer of several of them is stored once. A *labelled answer* is a pair of itself: chosen and rejected begin at the
same place. The two answers of a pair never do.

The arrays are raw and little-endian: nothing is pickled, and a file's size alone shows that it was cut short.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data import store_arrays
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec, describe_row
from megatron_bdpo.data.tokenization import BoolArray, PairTokens, TokenArray
from megatron_bdpo.data.tokenized_rows import TokenizedRows
from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import is_count, is_number, parse_json, schema_error
from megatron_bdpo.user_files import open_regular, read_regular

FORMAT_NAME = "megatron_bdpo pair store"
FORMAT_VERSION = 7

_META = "meta.json"
_TOKENS = store_arrays.TOKENS
_ARRAYS = store_arrays.ARRAYS
_VERIFIED_AT_ONCE = 2**24  # tokens


@dataclass(frozen=True)
class StoreInfo:
    """What a store says about itself besides its arrays.

    Attributes:
        fingerprint: hex SHA-256 of everything that decides the tokens: data, tokenizer, limits, rules.
        settings: everything that decides the tokens but the number of pairs, by name: digests of the data sets,
            tokenizer, chat template, limits. Stores of the same settings hold the same pairs, as far as both go.
        empty_prompt: token ids of the prompt that says nothing, of pairs that have none of their own.
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
        starts: int64 [P, 3], where prompt, chosen, rejected begin among the tokens; equal ones are the same.
        lengths: int32 [P, 3], tokens of prompt, chosen, rejected.
        source: int16 [P], index into ``sources``.
        row: int64 [P], row or line in that source, counted from 1.
        unsafe: int8 [P, 2], safety of chosen and rejected: 0 safe, 1 unsafe, -1 unknown.
        label: int8 [P], of labelled answers, whose chosen and rejected are one: see ``labels``; -1: a pair.
        reference: float64 [P, 2], log-probs of chosen and rejected that the rows bring; NaN: none. None: no row does.
        margin: float64 [P], margin of rewards that the rows ask for; NaN: none. None: no row does.
        score: float64 [P, 2], a judge's of chosen and rejected; NaN: none. None: no row has any.
        scored: int32 [P, 2], tokens of chosen and rejected that are scored: all but the turns of others in them.
        empty_prompt: int32 [length], the prompt of the unconditional log-probability of pairs without one of their own.
        unconditional: int32 [P], tokens of each pair's unconditional prompt.
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
        self.label: npt.NDArray[np.int8] = arrays["label"]
        self.reference: npt.NDArray[np.float64] | None = arrays["reference"] if len(arrays["reference"]) else None
        self.margin: npt.NDArray[np.float64] | None = arrays["margin"] if len(arrays["margin"]) else None
        self.score: npt.NDArray[np.float64] | None = arrays["score"] if len(arrays["score"]) else None
        self._tokens: TokenArray = arrays[_TOKENS]
        self.starts: npt.NDArray[np.int64] = arrays["starts"]
        self._context: npt.NDArray[np.int64] = arrays["context"]
        self._prompt_of: npt.NDArray[np.int32] = arrays["prompt_of"]
        self._own_ends = np.cumsum(arrays["own_lengths"], dtype=np.int64)
        self._own_prompts: TokenArray = arrays["own_prompts"]
        self.unconditional = _prompt_lengths(self._prompt_of, arrays["own_lengths"], len(self.empty_prompt))
        self.scored = _scored_lengths(self.lengths, self.starts, self._context)

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
        if not info.empty_prompt:
            raise _damaged(directory, f"{_META} has no empty prompt")
        if wrong := store_arrays.inconsistency(arrays, len(info.sources)):
            raise _damaged(directory, wrong)
        return cls(directory, info, arrays)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.lengths)

    @property
    def has_context(self) -> bool:
        """Whether some response holds tokens that are not scored."""
        return len(self._context) > 0

    def pair(self, index: int) -> PairTokens:
        """Token ids of one pair: views of the memory map, not copies.

        Raises:
            IndexError: no such pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of a store of {len(self)} pairs")
        bounds = [(int(a), int(a + n)) for a, n in zip(self.starts[index], self.lengths[index], strict=True)]
        prompt, chosen, rejected = (self._tokens[start:stop] for start, stop in bounds)
        if self.label[index] >= 0:
            rejected = chosen
        counts = (int(count) for count in self.scored[index])
        scored = (self._mask(*each, count) for each, count in zip(bounds[1:], counts, strict=True))
        return PairTokens(prompt, chosen, rejected, *scored)

    def prompt(self, index: int) -> TokenArray:
        """Token ids of one pair's prompt, a view of the memory map."""
        start = int(self.starts[index, 0])
        return self._tokens[start : start + int(self.lengths[index, 0])]

    def unconditional_prompt(self, index: int) -> TokenArray:
        """Token ids of the prompt that a pair's unconditional log-probability is conditioned on."""
        own = int(self._prompt_of[index])
        if own < 0:
            return self.empty_prompt
        end = int(self._own_ends[own])
        return self._own_prompts[end - int(self.unconditional[index]) : end]

    def _mask(self, start: int, stop: int, scored: int) -> BoolArray | None:
        """Which of the tokens from ``start`` to ``stop`` are scored; None: all, as ``scored`` says."""
        if scored == stop - start:
            return None
        mask = np.ones(stop - start, bool)
        first, last = np.searchsorted(self._context[:, 0], (start, stop))
        for a, b in self._context[first:last]:
            mask[a - start : b - start] = False
        return mask

    def describe(self, index: int) -> str:
        """Where a pair comes from, in words for a message: ``pairs.jsonl, line 17``."""
        return describe_row(self.sources[self.source[index]], int(self.row[index]))

    def verify(self, pause: Callable[[], None] = lambda: None) -> None:
        """Read all tokens and compare their checksum. Opening checks everything else.

        Args:
            pause: called before each piece of 64 MiB; what it raises ends the reading.

        Raises:
            UserError: the tokens are damaged.
        """
        expected = _read_meta(self.directory)["arrays"][_TOKENS]["crc32"]
        crc32 = 0
        for start in range(0, len(self._tokens), _VERIFIED_AT_ONCE):
            pause()
            crc32 = zlib.crc32(np.ascontiguousarray(self._tokens[start : start + _VERIFIED_AT_ONCE]), crc32)
        if crc32 != expected:
            raise _damaged(self.directory, "the checksum of tokens.bin is wrong")


class PairStoreWriter:
    """Writes a new store; tokens go to disk as they come, 93 bytes per pair stay in memory.

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
        self._columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _ARRAYS if name != _TOKENS}
        self._own_prompts = 0

    def __enter__(self) -> PairStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tokens.close()

    def __len__(self) -> int:
        """Number of pairs so far."""
        return sum(map(len, self._columns["lengths"]))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Lengths so far, int32 [P, 3]."""
        return np.concatenate([np.zeros((0, 3), np.int32), *self._columns["lengths"]])

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where the parts begin, so far, int64 [P, 3]."""
        return np.concatenate([np.zeros((0, 3), np.int64), *self._columns["starts"]])

    @property
    def label(self) -> npt.NDArray[np.int8]:
        """Labels of answers so far, int8 [P]."""
        return np.concatenate([np.zeros(0, np.int8), *self._columns["label"]])

    def extend(self, rows: TokenizedRows, source: int) -> None:
        """Add the pairs of some rows of a source."""
        data = rows.tokens.astype("<i4", copy=False).tobytes()
        self._tokens.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        columns: dict[str, npt.NDArray[Any]] = {
            "starts": self._written + rows.starts,
            "lengths": rows.lengths,
            "source": np.full(len(rows), source),
            "row": rows.row,
            "unsafe": rows.unsafe,
            "label": rows.label,
            "reference": rows.reference,
            "margin": rows.margin,
            "score": rows.score,
            "context": rows.context + self._written,
            "prompt_of": np.where(rows.prompt_of < 0, -1, rows.prompt_of + self._own_prompts),
            "own_prompts": rows.own_prompts,
            "own_lengths": rows.own_lengths,
        }
        for name, column in columns.items():
            self._columns[name].append(column.astype(_ARRAYS[name][0]))
        self._written += len(rows.tokens)
        self._own_prompts += len(rows.own_lengths)

    def finish(self, info: StoreInfo) -> None:
        """Write everything but the tokens, flush it all to disk, and write meta.json last."""
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        arrays = {_TOKENS: {"rows": self._written, "crc32": self._crc32}}
        for optional in store_arrays.OPTIONAL:
            if all(np.isnan(part).all() for part in self._columns[optional]):
                self._columns[optional] = []
        for name, columns in self._columns.items():
            data = b"".join(column.tobytes() for column in columns)
            write_whole(_array_path(self._directory, name), data)
            arrays[name] = {"rows": sum(map(len, columns)), "crc32": zlib.crc32(data)}
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


def _array_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"


def _damaged(directory: Path, what: str) -> UserError:
    return UserError(f"The pair store {directory} is damaged: {what}. Delete the directory; it is built anew.")


def _read_meta(directory: Path) -> dict[str, Any]:
    """meta.json, checked to be of a store and of this version."""
    path = directory / _META
    try:
        meta = parse_json(read_regular(path))
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
        with open_regular(path) as file:
            found_bytes = os.fstat(file.fileno()).st_size
        if found_bytes != expected_bytes or not (expected_bytes or name in store_arrays.MAY_BE_EMPTY):
            raise _damaged(directory, f"{path.name} has {found_bytes} bytes instead of {expected_bytes}")
        if not expected_bytes:  # which cannot be mapped
            return np.zeros(shape, dtype)
        mapped = np.memmap(path, dtype=dtype, mode="r", shape=shape)
    except OSError as error:
        raise _damaged(directory, f"{path.name} cannot be read ({error.strerror or error})") from error
    if name != _TOKENS and _crc32(mapped) != described["crc32"]:
        raise _damaged(directory, f"the checksum of {path.name} is wrong")
    # Plain ndarray views of the map: np.memmap's own subclass makes every slice several times slower.
    return mapped.view(np.ndarray)


def _prompt_lengths(
    prompt_of: npt.NDArray[np.int32], own_lengths: npt.NDArray[np.int32], shared: int
) -> npt.NDArray[np.int32]:
    everywhere: npt.NDArray[np.int32] = np.broadcast_to(np.int32(shared), prompt_of.shape)
    if not len(own_lengths):
        return everywhere
    return np.where(prompt_of < 0, everywhere, own_lengths[prompt_of])


def _scored_lengths(
    lengths: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], context: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    if not len(context):
        return lengths[:, 1:]
    before = np.concatenate([[0], np.cumsum(context[:, 1] - context[:, 0])])  # tokens of context before each stretch
    first, stop = (np.searchsorted(context[:, 0], edge) for edge in (starts[:, 1:], starts[:, 1:] + lengths[:, 1:]))
    return (lengths[:, 1:] - (before[stop] - before[first])).astype(np.int32)


def _crc32(values: npt.NDArray[Any]) -> int:
    return zlib.crc32(memoryview(np.ascontiguousarray(values)).cast("B"))
