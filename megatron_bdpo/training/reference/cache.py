"""Reference log-probs on disk: what a frozen model says about pairs, added part by part as it is found out.

A directory holds the log-probs of one token store's pairs under one reference, of as many of them as were asked for:

    manifest.json           what the numbers are of, who made them, and whether all that was asked for is there
    part-00000.safetensors  the first pairs that were scored; the next file has others, ...

A part has n pairs, in any order; axis 1 is chosen, rejected:

    pair           int64 [n]       the pair's index in the store
    conditional    float64 [n, 2]  log pi_ref(y|x), summed over the response's tokens, in nats; NaN: not known
    unconditional  float64 [n, 2]  log pi_ref(y): the same tokens after the empty prompt
    mismatched     float64 [n, 2]  the same after another row's prompt; absent where none is known
    beginnings     float64 [n, 2]  log pi_ref(y|x) of the first min(|y_w|, |y_l|) tokens of each; likewise
    tokens         int32 [n, 2]    |y|
    source         int16 [n]       index of the data set among the manifest's sources
    row            int64 [n]       row or line there, counted from 1

A part carries a checksum and the digest of the manifest's identity. It is written whole, to a number that no file has,
so no job changes what another has written. Of two log-probs of one pair that of the lower number counts.
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

from megatron_bdpo.artifact import tell_completed, write_whole
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import Each, Maybe, is_count, parse_json, schema_error
from megatron_bdpo.user_files import open_regular, read_regular

FloatArray = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]

FORMAT_NAME = "megatron_bdpo reference scores"
#: Raised when the layout of the files, or the meaning of the numbers, changes.
FORMAT_VERSION = 3

#: The kinds of log-probs, in the order of ``data.prompt_kinds.PromptKind``.
KINDS = ("conditional", "unconditional", "mismatched")

#: And one that the pass of the conditional ones finds beside them.
BEGINNINGS = "beginnings"

#: Of an identity that has one: the version of its names. See ``fingerprint``.
IDENTITY_VERSION = "identity_version"

MANIFEST = "manifest.json"
_METADATA = "scores"

# Name -> dtype, columns, and what stands for an unknown value.
_COLUMNS: dict[str, tuple[str, int | None, float]] = {
    "conditional": ("<f8", 2, np.nan),
    "unconditional": ("<f8", 2, np.nan),
    "mismatched": ("<f8", 2, np.nan),
    BEGINNINGS: ("<f8", 2, np.nan),
    "tokens": ("<i4", 2, 0),
    "source": ("<i2", None, -1),
    "row": ("<i8", None, 0),
}
#: Of these, what is in a file only where it holds a number.
_OPTIONAL = ("mismatched", BEGINNINGS)


@dataclass(frozen=True, eq=False)
class Scores:
    """All log-probs of a directory. P pairs, in the token store's order: a pair's id is its index."""

    conditional: FloatArray
    """float64 [P, 2], chosen and rejected, in nats; NaN where not known."""
    unconditional: FloatArray
    """The same after the empty prompt."""
    mismatched: FloatArray
    """The same after another row's prompt."""
    tokens: npt.NDArray[np.int32]
    """[P, 2], response tokens; 0 where nothing is known of the pair."""
    source: npt.NDArray[np.int16]
    """[P], index into ``manifest["sources"]``; -1 where nothing is known."""
    row: npt.NDArray[np.int64]
    """[P], row or line of that source, counted from 1; 0 where nothing is known."""
    beginnings: FloatArray
    """[P, 2], as ``conditional``, of the pair's common length."""
    manifest: dict[str, Any]
    """As it was read."""

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.tokens)


def open_scores(directory: Path | str, *, unfinished: bool = False) -> Scores:
    """Read a directory of reference log-probs.

    Args:
        directory: the one with the manifest.
        unfinished: also read one whose job has not ended; what is not known yet is NaN.

    Raises:
        UserError: none there, not finished, of another format, or damaged; the file is named.
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
    arrays, damaged = ScoreCache(directory, manifest).read()
    if damaged:
        raise UserError(f"{damaged[0]}. Run the scoring job again: it scores damaged parts anew.")
    return Scores(**arrays, manifest=manifest)


class ScoreCache:
    """A directory of reference log-probs that a job reads and adds to."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        """As it was when the directory was opened."""
        self._identity = _digest(manifest["identity"])
        self._damaged: list[Path] = []

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> ScoreCache:
        """Open a directory, or begin one.

        Args:
            identity: everything that decides the numbers, as JSON values by the user's names for them.
            about: what else the manifest of a new directory tells a reader.

        Raises:
            UserError: the directory is of another identity (the differing fields are named), damaged, or cannot be
                written.
        """
        identity = json.loads(json.dumps(identity))  # as it comes back: tuples are lists
        manifest = _read_manifest(directory)
        if manifest is None:
            manifest = {
                "format": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "identity": identity,
                **about,
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
        return cls(directory, manifest)

    def read(self, pairs: int | None = None) -> tuple[Arrays, list[str]]:
        """What is known of the store's first ``pairs`` pairs; of all that the directory speaks of where it is None.

        Returns:
            The columns of a part by name, for all pairs in the store's order, and a sentence about every damaged file;
            what a damaged file holds counts as unknown.
        """
        if pairs is None:
            pairs = self._pairs(max((part.pairs for part in self._parts({})), default=0))
        arrays, damaged = _unknown(pairs), dict[Path, str]()
        for part in self._parts(damaged):
            within = part.pair < len(arrays["row"])
            place = part.pair[within]
            for name, column in part.columns.items():
                new, there = column[within], arrays[name]
                there[place] = np.where(np.isnan(new), there[place], new) if new.dtype.kind == "f" else new
        self._damaged = list(reversed(damaged))
        return arrays, [damaged[path] for path in self._damaged]

    def _parts(self, damaged: dict[Path, str]) -> Iterator[_Part]:
        """All that can be read, one at a time, the first one last: it counts. Others go into ``damaged``."""
        for path in reversed(self._files()):
            try:
                yield self._read_part(path)
            except _PartError as problem:
                damaged[path] = f"{path} is damaged ({problem})"

    def add(self, pair: npt.NDArray[np.int64], columns: Arrays, pairs: int) -> None:
        """Add a part, durably.

        Args:
            pair: [n] indices in the store, each once.
            columns: the other columns of a part.
            pairs: that the store has.

        Raises:
            UserError: the directory cannot be written.
        """
        known = {name for name in columns if name not in _OPTIONAL or not np.isnan(columns[name]).all()}
        arrays = {"pair": pair, **{name: values for name, values in columns.items() if name in known}}
        place = {"version": FORMAT_VERSION, "identity": self._identity, "pairs": pairs}
        # One entry: safetensors writes several in any order, and equal parts shall be equal files.
        metadata = {_METADATA: json.dumps({**place, "crc32": _checksum(arrays, place)})}
        content = save({name: np.ascontiguousarray(values) for name, values in arrays.items()}, metadata)
        with _failures_to_write(self.directory):
            number = int(files[-1].stem.removeprefix("part-")) + 1 if (files := self._files()) else 0
            while not write_whole(self.directory / f"part-{number:05d}.safetensors", content, replace=False):
                number += 1  # another job was faster
        tell_completed(self.directory / f"part-{number:05d}.safetensors")

    def finish(self, pairs: int, scored: Mapping[str, int], job: Mapping[str, Any]) -> None:
        """Commit: all that a job needs of the store's first ``pairs`` pairs is there. Damaged files are removed.

        Args:
            scored: number of pairs by kind.
            job: who has scored, for the record; empty where nothing was left to score.
        """
        manifest = _read_manifest(self.directory) or self.manifest
        complete = manifest["complete"] or {"pairs": 0, "scored": {}}
        counts = {kind: max(complete["scored"].get(kind, 0), scored.get(kind, 0)) for kind in (*KINDS, BEGINNINGS)}
        counts = {kind: count for kind, count in counts.items() if count or kind not in _OPTIONAL}
        new = {
            **manifest,
            "complete": {"pairs": max(pairs, complete["pairs"]), "scored": counts},
            "jobs": [*manifest["jobs"], *([dict(job)] if job else [])],
        }
        with _failures_to_write(self.directory):
            for path in self._damaged:
                path.unlink(missing_ok=True)
            if new != manifest:
                write_whole(self.directory / MANIFEST, _as_json(new))

    def _files(self) -> list[Path]:
        """All parts, by their numbers."""
        found = (path for path in self.directory.iterdir() if re.fullmatch(r"part-\d{5,9}\.safetensors", path.name))
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def _pairs(self, there: int) -> int:
        """That the store has, as far as the directory tells, and its files of ``there``."""
        complete = self.manifest["complete"]
        if complete and complete["pairs"] > there + _MOST_UNSEEN_PAIRS:
            raise UserError(
                f"{self.directory / MANIFEST} is damaged: it speaks of {complete['pairs']} pairs, and the files there "
                f"of {there}. Delete the directory; it is made again."
            )
        return max(there, complete["pairs"] if complete else 0)

    def _read_part(self, path: Path) -> _Part:
        try:
            open_regular(path).close()  # the library would wait for ever for a FIFO
            with safe_open(path, framework="numpy") as file:
                metadata = parse_json((file.metadata() or {})[_METADATA])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            crc32 = metadata.pop("crc32", None)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _PartError(str(error)) from error
        pairs, pair = metadata.get("pairs"), arrays.get("pair")
        place = {"version": FORMAT_VERSION, "identity": self._identity, "pairs": pairs}
        if metadata != place:
            raise _PartError("it belongs to another directory or place")
        if crc32 != _checksum(arrays, place):
            raise _PartError("its checksum is wrong")
        unknown = _unknown(np.size(arrays.get("row", ())))
        arrays = {name: unknown[name] for name in _OPTIONAL} | arrays
        if any(name not in arrays or not _alike(arrays[name], each) for name, each in unknown.items()):
            raise _PartError("its arrays have other shapes")
        if not is_count(pairs) or pair is None or not _alike(pair, unknown["row"]) or not _within(pair, pairs):
            raise _PartError("it speaks of pairs that there cannot be")
        return _Part(pair, {name: arrays[name] for name in _COLUMNS}, pairs)


@dataclass(frozen=True, eq=False)
class _Part:
    """A file that has been read: n pairs."""

    pair: npt.NDArray[np.int64]
    """[n], indices in the store."""
    columns: Arrays
    """The others, by name."""
    pairs: int
    """That the store has, at least."""


#: A job of which nothing is left on disk may have known of more pairs than the files tell, and of no more than these.
_MOST_UNSEEN_PAIRS = 2**22


def scored_after(kind: str) -> PromptKind:
    """The prompt that a pass scores answers after to find log-probs of a kind."""
    return PromptKind(KINDS.index("conditional" if kind == BEGINNINGS else kind))


class _PartError(Exception):
    """A file that cannot be used, and why."""


def _unknown(pairs: int) -> Arrays:
    return {
        name: np.full((pairs,) if columns is None else (pairs, columns), unknown, dtype)
        for name, (dtype, columns, unknown) in _COLUMNS.items()
    }


def _alike(values: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    return values.dtype == other.dtype and values.shape == other.shape


def _within(pair: npt.NDArray[np.int64], pairs: int) -> bool:
    return len(pair) == 0 or bool(pair.min() >= 0 and pair.max() < pairs)


def _checksum(arrays: Arrays, place: Mapping[str, Any]) -> int:
    """Of the arrays, in the order of their columns, and of what else a file says about itself."""
    crc = zlib.crc32(json.dumps(place, sort_keys=True).encode())
    for name in ("pair", *_COLUMNS):
        if name in arrays:
            crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), crc)
    return crc


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, checked to be of log-probs and of this version; None where there is none."""
    path = directory / MANIFEST
    try:
        manifest = parse_json(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Delete the directory; it is made again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        raise UserError(f"{directory} holds something else than reference scores. Name another directory.")
    if manifest.get("version") != FORMAT_VERSION or "shard_pairs" in manifest:  # which version 2 has begun it with
        raise UserError(
            f"the reference scores in {directory} were begun in format version {manifest.get('version')} or before, "
            f"this program reads version {FORMAT_VERSION}. Delete the directory; it is made again."
        )
    if wrong := schema_error(manifest, _MANIFEST_SHAPE):
        raise UserError(f"{path} is damaged: {wrong}. Delete the directory; it is made again.")
    return manifest


_MANIFEST_SHAPE = {
    "identity": dict,
    "complete": Maybe({"pairs": is_count, "scored": Each(is_count)}),
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
    if (IDENTITY_VERSION in there) != (IDENTITY_VERSION in here):  # the names are others: listing them says nothing
        which = "an earlier" if IDENTITY_VERSION in here else "a later"
        fields = f"  they were written by {which} version of this program, which tells models apart by other settings"
    return (
        f"the reference scores in {directory} are of something else:\n{fields}\n"
        "Name another --reference-cache directory, or delete this one to score again."
    )
