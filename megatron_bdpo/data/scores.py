"""Reference scores on disk: what a frozen model says about every pair, written shard by shard as it is found out.

A directory holds the scores of one token store's pairs under one reference:

    manifest.json            what the numbers are of, who made them, and whether all that was asked for is there
    shard-00000.safetensors  the store's first ``shard_pairs`` pairs; the next file has the next ones, ...

A shard has n pairs in the store's order; axis 1 is chosen, rejected:

    conditional    float64 [n, 2]  log pi_ref(y|x), summed over the response's tokens, in nats; NaN: not scored
    unconditional  float64 [n, 2]  log pi_ref(y): the same tokens after the empty prompt
    tokens         int32 [n, 2]    |y|
    source         int16 [n]       index of the data set among the manifest's sources
    row            int64 [n]       row or line there, counted from 1

A shard carries a checksum of its numbers and the digest of the manifest's identity; it is written under another name,
flushed and renamed, so a file with a shard's name is whole or damaged, never half done. Several jobs may fill one
directory: each adds to a shard what the file does not have, and at worst one job's additions are made again. A killed
job leaves hidden ``.partial`` files, which nobody reads and anybody may delete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_bdpo.errors import UserError
from megatron_bdpo.files import write_whole
from megatron_bdpo.json_shape import Maybe, is_count, misshapen, parse_json

FloatArray = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]

FORMAT_NAME = "megatron_bdpo reference scores"
#: Raised when the layout of the files, or the meaning of the numbers, changes.
FORMAT_VERSION = 2

#: The kinds of scores.
KINDS = ("conditional", "unconditional")

MANIFEST = "manifest.json"
DEFAULT_SHARD_PAIRS = 4096
MOST_SHARD_PAIRS = 2**22
_METADATA = "scores"

# Name -> dtype, columns, and what stands for an unknown value.
_COLUMNS: dict[str, tuple[str, int | None, float]] = {
    "conditional": ("<f8", 2, np.nan),
    "unconditional": ("<f8", 2, np.nan),
    "tokens": ("<i4", 2, 0),
    "source": ("<i2", None, -1),
    "row": ("<i8", None, 0),
}


@dataclass(frozen=True, eq=False)
class Scores:
    """All scores of a directory. P pairs, in the token store's order: a pair's id is its index.

    Attributes:
        conditional, unconditional: float64 [P, 2], chosen and rejected, in nats; NaN where not scored.
        tokens: int32 [P, 2], response tokens; 0 where nothing is known of the pair.
        source: int16 [P], index into ``manifest["sources"]``; -1 where nothing is known.
        row: int64 [P], row or line of that source, counted from 1; 0 where nothing is known.
        manifest: the manifest, as it was read.
    """

    conditional: FloatArray
    unconditional: FloatArray
    tokens: npt.NDArray[np.int32]
    source: npt.NDArray[np.int16]
    row: npt.NDArray[np.int64]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.tokens)


def open_scores(directory: Path | str, *, unfinished: bool = False) -> Scores:
    """Read a directory of scores.

    Args:
        directory: the one with the manifest.
        unfinished: also read one whose job has not ended; what it has not scored yet is NaN.

    Raises:
        UserError: no scores there, not finished, of another format, or damaged; the file is named.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if manifest is None:
        inner = sorted(str(found.parent) for found in directory.glob(f"**/{MANIFEST}"))
        raise UserError(
            f"{directory} holds no reference scores: it has no {MANIFEST}. "
            + (f"These do: {', '.join(inner)}." if inner else "Make them with megatron-bdpo score.")
        )
    if not manifest["complete"] and not unfinished:
        raise UserError(f"the reference scores in {directory} are not finished. Run the same scoring job again.")
    cache = ScoreCache(directory, manifest)
    arrays, damaged = cache.read(_pairs_in(cache))
    if damaged:
        raise UserError(f"{damaged[0]}. Run the scoring job again: it scores damaged shards anew.")
    return Scores(**arrays, manifest=manifest)


def _pairs_in(cache: ScoreCache) -> int:
    complete = cache.manifest["complete"]
    shards = [int(match[1]) for path in cache.directory.iterdir() if (match := _SHARD.fullmatch(path.name))]
    there = (max(shards, default=-1) + 1) * cache.shard_pairs
    if complete and complete["pairs"] > there + _MOST_EMPTY_SHARDS * cache.shard_pairs:
        raise UserError(
            f"{cache.directory / MANIFEST} is damaged: it speaks of {complete['pairs']} pairs, and the shards there "
            f"end at {there}. Delete the directory; it is made again."
        )
    return int(complete["pairs"]) if complete else there


_SHARD = re.compile(r"shard-(\d{5,9})\.safetensors")

#: After the last shard there may be pairs of which none was asked for, and no more shards' worth than this.
_MOST_EMPTY_SHARDS = 1000


class ScoreCache:
    """A directory of scores that a job reads and adds to.

    Attributes:
        directory: where it lies.
        manifest: as it was when the directory was opened.
        shard_pairs: pairs in a shard.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.shard_pairs = int(manifest["shard_pairs"])
        self._identity = _digest(manifest["identity"])

    @classmethod
    def open(
        cls, directory: Path, identity: Mapping[str, Any], about: Mapping[str, Any], shard_pairs: int | None = None
    ) -> ScoreCache:
        """Open a directory, or begin one.

        Args:
            identity: everything that decides the numbers, as JSON values by the user's names for them.
            about: what else the manifest of a new directory tells a reader.
            shard_pairs: pairs in a shard; None takes what is there, else the default.

        Raises:
            UserError: the directory is of another identity (the differing fields are named), of another shard size,
                damaged, or cannot be written.
        """
        identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
        manifest = _read_manifest(directory)
        if manifest is None:
            manifest = {
                "format": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "identity": identity,
                **about,
                "shard_pairs": shard_pairs or DEFAULT_SHARD_PAIRS,
                "complete": None,
                "jobs": [],
            }
            with _failures_to_write(directory):
                directory.mkdir(parents=True, exist_ok=True)
                write_whole(directory / MANIFEST, _as_json(manifest), replace=False)
            manifest = _read_manifest(directory)  # another job may have been first
            assert manifest is not None
        if manifest["identity"] != identity:
            raise UserError(_mismatch(directory, manifest["identity"], identity))
        if shard_pairs not in (None, manifest["shard_pairs"]):
            raise UserError(
                f"the reference scores in {directory} are in shards of {manifest['shard_pairs']} pairs, not of "
                f"{shard_pairs}. Leave --score-shard-pairs out, or name another directory."
            )
        return cls(directory, manifest)

    def read(self, pairs: int) -> tuple[Arrays, list[str]]:
        """What is known of the store's first ``pairs`` pairs.

        Returns:
            The arrays of a shard by name, for all pairs, and a sentence about every damaged shard; what a damaged
            shard holds counts as unknown.
        """
        arrays = _unknown(pairs)
        damaged = []
        for index in range(-(-pairs // self.shard_pairs)):
            try:
                shard = self._read_shard(index)
            except _DamagedError as problem:
                damaged.append(f"{self._path(index)} is damaged ({problem})")
                continue
            first = index * self.shard_pairs
            for name, values in shard.items():
                part = arrays[name][first : first + self.shard_pairs]
                part[: len(values)] = values[: len(part)]
        return arrays, damaged

    def add(self, index: int, arrays: Arrays) -> Arrays:
        """Add to one shard, durably. Scores that the file has already stay: all jobs shall use the same ones.

        Args:
            arrays: as in a shard, for its first n pairs.

        Returns:
            The same, with the scores that the file has now.

        Raises:
            UserError: the directory cannot be written.
        """
        try:
            there = self._read_shard(index)
        except _DamagedError:
            there = {}
        merged = {name: _merge(there.get(name), values) for name, values in arrays.items()}
        # One entry: safetensors writes several in any order, and equal shards shall be equal files.
        metadata = {_METADATA: json.dumps({**self._place(index), "crc32": _checksum(merged)})}
        with _failures_to_write(self.directory):
            write_whole(self._path(index), save(merged, metadata))
        return {name: values[: len(arrays[name])] for name, values in merged.items()}

    def finish(self, pairs: int, scored: Mapping[str, int], job: Mapping[str, Any]) -> None:
        """Commit: all that a job needs of the store's first ``pairs`` pairs is there.

        Args:
            scored: number of pairs by kind.
            job: who has scored, for the record; empty where nothing was left to score.
        """
        manifest = _read_manifest(self.directory) or self.manifest
        complete = manifest["complete"] or {"pairs": 0, "scored": dict.fromkeys(KINDS, 0)}
        counts = {kind: max(complete["scored"][kind], scored.get(kind, 0)) for kind in KINDS}
        new = {
            **manifest,
            "complete": {"pairs": max(pairs, complete["pairs"]), "scored": counts},
            "jobs": [*manifest["jobs"], *([dict(job)] if job else [])],
        }
        if new != manifest:
            with _failures_to_write(self.directory):
                write_whole(self.directory / MANIFEST, _as_json(new))

    def _path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.safetensors"

    def _place(self, index: int) -> dict[str, Any]:
        """What a shard's file says about where it belongs."""
        return {"version": FORMAT_VERSION, "identity": self._identity, "first_pair": index * self.shard_pairs}

    def _read_shard(self, index: int) -> Arrays:
        """A shard's arrays; none of any pair where there is no file."""
        path = self._path(index)
        if not path.exists():
            return _unknown(0)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = parse_json((file.metadata() or {})[_METADATA])
                arrays = {name: file.get_tensor(name) for name in _COLUMNS}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(str(error)) from error
        crc32 = metadata.pop("crc32", None)
        if metadata != self._place(index):
            raise _DamagedError("it belongs to another directory or place")
        if crc32 != _checksum(arrays):
            raise _DamagedError("its checksum is wrong")
        expected = _unknown(len(arrays["row"]))
        if any((arrays[name].dtype, arrays[name].shape) != (each.dtype, each.shape) for name, each in expected.items()):
            raise _DamagedError("its arrays have other shapes")
        return arrays


class _DamagedError(Exception):
    """A shard that cannot be used, and why."""


def _unknown(pairs: int) -> Arrays:
    return {
        name: np.full((pairs,) if columns is None else (pairs, columns), unknown, dtype)
        for name, (dtype, columns, unknown) in _COLUMNS.items()
    }


def _merge(there: npt.NDArray[Any] | None, new: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What is there, ``new`` where it is NaN, and whichever goes beyond the other's end."""
    if there is None:
        return np.ascontiguousarray(new)
    merged = np.concatenate([new, there[len(new) :]])
    if merged.dtype.kind == "f":
        overlap = slice(min(len(there), len(new)))
        merged[overlap] = np.where(np.isnan(there[overlap]), merged[overlap], there[overlap])
    return merged


def _checksum(arrays: Arrays) -> int:
    crc = 0
    for name in _COLUMNS:
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return crc


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, checked to be of scores and of this version; None where there is none."""
    path = directory / MANIFEST
    try:
        manifest = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Delete the directory; it is made again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        raise UserError(f"{directory} holds something else than reference scores. Name another directory.")
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"the reference scores in {directory} have format version {manifest.get('version')}, this program reads "
            f"version {FORMAT_VERSION}. Delete the directory; it is made again."
        )
    if wrong := misshapen(manifest, _MANIFEST_SHAPE):
        raise UserError(f"{path} is damaged: {wrong}. Delete the directory; it is made again.")
    return manifest


_MANIFEST_SHAPE = {
    "identity": dict,
    "shard_pairs": lambda count: is_count(count) and 0 < count <= MOST_SHARD_PAIRS,
    "complete": Maybe({"pairs": is_count, "scored": dict.fromkeys(KINDS, is_count)}),
    "jobs": [dict],
}


@contextlib.contextmanager
def _failures_to_write(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the reference scores cannot be written to {directory}: {error.strerror or error}.") from error


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line for each field in which two identities differ."""
    names = [name for name in {**there, **here} if there.get(name, _ABSENT) != here.get(name, _ABSENT)]
    return [
        f"{name}: {_shown(there.get(name, _ABSENT))} there, {_shown(here.get(name, _ABSENT))} here" for name in names
    ]


_ABSENT = "nothing"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]!r}... ({len(text)} characters, {_digest(text)[:8]})"


def _mismatch(directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    fields = "\n".join(f"  {line}" for line in differences(there, here))
    return (
        f"the reference scores in {directory} are of something else:\n{fields}\n"
        "Name another --reference-cache directory, or delete this one to score again."
    )
