"""Where rows come from: local files, directories and Hugging Face data sets, read row by row.

JSON lines are read here, so that a broken line is reported by its number. Everything else goes through the
``datasets`` library, which is imported in this file only, and only when such a source is named.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import json
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bdpo import hub
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.errors import UserError
from megatron_bdpo.user_files import near

type Row = dict[str, Any]

# File name ending -> the `datasets` builder that reads it; None is our own JSON-lines reader.
_BUILDERS = {
    ".jsonl": None,
    ".jsonl.gz": None,
    ".json": None,
    ".json.gz": None,
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_ENDINGS = ", ".join(_BUILDERS)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SAVED_DATASET, _SAVED_DATASET_DICT = "state.json", "dataset_dict.json"  # what Dataset.save_to_disk leaves behind
_HASH_CHUNK = 1 << 20

#: A line of JSON: a row of a million tokens, with every character escaped, takes half of it.
MOST_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SourceSpec:
    """One data set: ``path`` is a file, a directory or a hub name, the latter two with an optional ``:split``.

    ``weight`` says how many times per epoch each of its pairs is seen, on average.
    """

    path: str
    weight: float = 1.0


def parse_sources(tokens: Iterable[str]) -> tuple[SourceSpec, ...]:
    """Read the flag form ``[WEIGHT] PATH [[WEIGHT] PATH ...]``. A path without a weight has weight 1.

    Raises:
        UserError: no path, a weight without a path, a weight that is not a positive number, a path named twice.
    """
    specs: list[SourceSpec] = []
    weight: float | None = None
    for token in tokens:
        number = _as_number(token)
        if number is None:
            specs.append(SourceSpec(token, 1.0 if weight is None else weight))
            weight = None
        elif weight is not None:
            raise UserError(f"--pair-data: {weight:g} and {token} follow each other; a weight comes before a path.")
        elif not (math.isfinite(number) and number > 0):
            raise UserError(f"--pair-data: the weight {token} is not a positive number.")
        else:
            weight = number
    if weight is not None:
        raise UserError(f"--pair-data: no path follows the weight {weight:g}. (A file of that name is ./{weight:g}.)")
    if not specs:
        raise UserError("--pair-data: no path is given. Name at least one file, directory or Hugging Face data set.")
    paths = [spec.path for spec in specs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--pair-data: {path} is named {paths.count(path)} times. Name it once, with a weight.")
    return tuple(specs)


def check_sources(specs: Iterable[SourceSpec]) -> None:
    """Raise UserError if a local source is not there; hub names are looked up when they are read."""
    for spec in specs:
        _locate(spec)


def read_rows(spec: SourceSpec) -> Iterator[tuple[int, Row | RowProblem]]:
    """Yield every row with its number, counted from 1: in JSON lines the line, elsewhere the row.

    The numbers run on through the files of a directory. A line that is no JSON object comes as a `RowProblem`;
    blank lines are passed over. Memory is bounded.

    Raises:
        UserError: the source is missing, empty, unreadable or, for a hub name, not reachable.
    """
    for number, raw in read_raw_rows(spec):
        yield number, parse_raw(raw)


type RawRow = bytes | Row
"""A line of JSON, or a row of a table."""


def read_raw_rows(spec: SourceSpec) -> Iterator[tuple[int, RawRow]]:
    """As :func:`read_rows`, before :func:`parse_raw`, which another process may do."""
    seen = False
    for number, raw in _number_rows(_locate(spec)):
        seen = True
        yield number, raw
    if not seen:
        raise UserError(f"{spec.path} is empty: it holds no row.")


def parse_raw(raw: RawRow) -> Row | RowProblem:
    """The row, or what is wrong with its line. Nulls inside of a table's columns are left out.

    A table gives every message, tool and argument of a column the fields of all others.
    """
    if isinstance(raw, bytes):
        return _parse_line(raw)
    return {column: _without_nulls(value) for column, value in raw.items()}


def count_rows(spec: SourceSpec) -> int | None:
    """How many rows there are, for a progress bar; None where that takes more than a glance."""
    location = _locate(spec)
    if not location.files or location.saved_in or _builder(location.files[0]) is not None:
        return None
    if any(file.name.lower().endswith(".gz") for file in location.files):
        return None
    return sum(map(_count_lines, location.files))


def _count_lines(path: Path) -> int:
    with _readable(path), path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_HASH_CHUNK), b""))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def describe_row(spec: SourceSpec, number: int) -> str:
    """Where a row is, in words for a message: ``pairs.jsonl, line 17``."""
    is_one_text_file = Path(spec.path).is_file() and _builder(Path(spec.path)) is None
    return f"{spec.path}, {'line' if is_one_text_file else 'row'} {number}"


def sha256_of_file(path: Path, pause: Callable[[], None] = lambda: None) -> str:
    """Hex SHA-256 of a file's size and content, read in pieces, before each of which ``pause`` is called."""
    digest = hashlib.sha256(f"{path.stat().st_size}:".encode())
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            pause()
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(spec: SourceSpec, digest_of_file: Callable[[Path], str] = sha256_of_file) -> str:
    """Hex digest that changes when the rows may have: of local files' content, or `datasets`' own for a hub name.

    Where the files lie does not matter. ``digest_of_file`` lets a caller remember the digests of large files.

    Raises:
        UserError: as `read_rows`.
    """
    location = _locate(spec)
    digest = hashlib.sha256()
    if location.hub_name is not None:
        digest.update(f"hub {_load_from_hub(location)._fingerprint}".encode())
    else:
        for file in location.files:
            # A saved directory's splits are its sub-directories: there the names are part of the content.
            role = file.relative_to(location.saved_in) if location.saved_in else _builder(file)
            with _readable(file):
                digest.update(f"{role} {digest_of_file(file)}\n".encode())
        digest.update(f"split {location.split}".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# From a name to what it stands for
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Location:
    """What a source's path stands for: local files, a directory saved by `datasets`, or a hub name."""

    name: str  # as the user wrote it
    files: tuple[Path, ...] = ()
    saved_in: Path | None = None  # set: the files are those of Dataset.save_to_disk
    hub_name: str | None = None
    split: str | None = None


def _locate(spec: SourceSpec) -> _Location:
    """Find out what ``spec.path`` stands for. A local file or directory wins over a hub name."""
    try:
        return _locate_any(spec)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # no permission, too long a name, no such home directory
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{spec.path}: cannot be looked for ({reason}).") from error


def _locate_any(spec: SourceSpec) -> _Location:
    whole = Path(spec.path).expanduser()
    if whole.is_file():
        return _Location(spec.path, files=(_known(whole),))
    if whole.is_dir():
        return _locate_directory(spec, whole, split=None)
    name, colon, split = spec.path.partition(":")
    if colon and not split:
        raise UserError(f"{spec.path}: no split follows the colon. Write {name}:train, or leave the colon out.")
    path = Path(name).expanduser()
    if path.is_dir():
        return _locate_directory(spec, path, split=split)
    if path.is_file():
        raise UserError(f"{spec.path}: a split can be named for a hub data set or a saved directory, not for a file.")
    if not _HUB_NAME.fullmatch(name) or _ending(path) is not None:
        told = near(path) or "Name an existing one, or a Hugging Face data set."
        raise UserError(f"{spec.path}: there is no such file or directory (looked in {Path.cwd()}). {told}")
    return _Location(spec.path, hub_name=name, split=split or "train")


def _locate_directory(spec: SourceSpec, path: Path, split: str | None) -> _Location:
    """A directory that `datasets` saved, or one that holds data files of one kind."""
    if (path / _SAVED_DATASET).is_file() or (path / _SAVED_DATASET_DICT).is_file():
        files = tuple(sorted(path.rglob("*.arrow")))
        return _Location(spec.path, files=files, saved_in=path, split=split)
    if split is not None:
        raise UserError(f"{spec.path}: {path} was not written by Dataset.save_to_disk, so it has no split {split!r}.")
    files = tuple(sorted(file for file in path.iterdir() if file.is_file() and _ending(file) is not None))
    if not files:
        raise UserError(f"{spec.path}: the directory holds no data. Looked for files that end in {_ENDINGS}.")
    if len({_builder(file) for file in files}) > 1:
        endings = ", ".join(sorted({str(_ending(file)) for file in files}))
        raise UserError(f"{spec.path}: the directory mixes {endings} files. Name the files to read one by one.")
    return _Location(spec.path, files=files)


def _known(path: Path) -> Path:
    if _ending(path) is None:
        raise UserError(f"{path}: unknown kind of file. The name must end in one of {_ENDINGS}.")
    return path


def _ending(path: Path) -> str | None:
    """The ending that says how to read the file, or None."""
    return next((ending for ending in _BUILDERS if path.name.lower().endswith(ending)), None)


def _builder(path: Path) -> str | None:
    """The `datasets` builder for the file; None for JSON lines."""
    ending = _ending(path)
    return None if ending is None else _BUILDERS[ending]


def _as_number(token: str) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------


def _number_rows(location: _Location) -> Iterator[tuple[int, RawRow]]:
    if location.hub_name is not None:
        yield from enumerate(_guarded(location.name, _load_from_hub(location)), start=1)
    elif location.saved_in is not None:
        yield from enumerate(_guarded(location.name, _load_saved(location)), start=1)
    elif _builder(location.files[0]) is not None:
        rows = (row for file in location.files for row in _guarded(str(file), _stream_table(file)))
        yield from enumerate(rows, start=1)
    else:
        before = 0
        for file in location.files:
            line = 0
            for line, row in _read_json_lines(file):
                if row is not None:
                    yield before + line, row
            before += line


def _read_json_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield every line's number and the line; None for a blank one."""
    with _readable(path), gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        # In pieces of bounded length: a few KB of gzip may hold a line of many GB.
        for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE_BYTES + 1), b""), start=1):
            if len(line) > MOST_LINE_BYTES:
                raise UserError(
                    f"{path}, line {number} has more than {MOST_LINE_BYTES >> 20} MiB, which is no row of pairs. Write "
                    "one object per line, or leave the line out."
                )
            if number == 1:
                _refuse_other_encodings(path, line)
                line = line.removeprefix(codecs.BOM_UTF8)  # some editors put it there
                if line.lstrip().startswith(b"["):
                    raise UserError(
                        f"{path} is one JSON array; write one object per line instead, for example with "
                        f"`jq -c '.[]' {path.name} > rows.jsonl`."
                    )
            yield number, line if line.strip() else None


def _refuse_other_encodings(path: Path, line: bytes) -> None:
    """Of a file's first line: text of two or four bytes a character would be a malformed row in every line."""
    marks = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    name = next((each for each, begins in marks.items() if line.startswith(begins)), "")
    if not name and b"\0" not in line[:100]:
        return
    plain = path.name.removesuffix(".gz")
    raise UserError(
        f"{path} is {name or 'UTF-16, or no text at all'}; rows are text in UTF-8. Convert it: "
        f"`iconv -f {name or 'UTF-16'} -t UTF-8 {plain} > utf8.jsonl`."
    )


def _parse_line(line: bytes) -> Row | RowProblem:
    try:
        row = json.loads(line.decode("utf-8").strip())
    except (ValueError, RecursionError) as error:
        return RowProblem(ProblemKind.BAD_JSON, str(error))
    if not isinstance(row, dict):
        return RowProblem(ProblemKind.BAD_JSON, f"{type(row).__name__}, not an object")
    return row


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the failures of reading a file into a message that names it."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}). Copy or compress it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _guarded(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Pass rows on; whatever the library raises on a damaged file becomes a message that names the source."""
    try:
        yield from rows
    except Exception as error:  # pyarrow, fsspec and datasets have no common base class
        told = " ".join(str(error).split())
        raise UserError(f"{name} cannot be read. Is the file whole? {type(error).__name__}: {told}") from error


def _datasets() -> Any:
    import datasets  # takes seconds, and most data are JSON lines

    return datasets


def _stream_table(path: Path) -> Iterator[Row]:
    """Rows of a Parquet or Arrow file, streamed: nothing is copied into `datasets`' own cache."""
    # Lock files are written even so, and a compute node's home may be read-only.
    with tempfile.TemporaryDirectory() as locks:
        yield from _datasets().load_dataset(
            _builder(path), data_files=str(path), split="train", streaming=True, cache_dir=locks
        )


def _load_saved(location: _Location) -> Any:
    """A `Dataset` from a directory written by ``save_to_disk``, cut to the split that was asked for."""
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(location.saved_in))
    except Exception as error:
        raise UserError(f"{location.name} cannot be loaded ({type(error).__name__}: {error}).") from error
    parts = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if location.split is None and "train" not in parts:
        raise UserError(f"{location.name} holds the splits {', '.join(parts)}: name one as {location.name}:SPLIT.")
    wanted = location.split or "train"
    try:
        sizes = {name: len(part) for name, part in parts.items()}
        (cut,) = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
    except Exception as error:
        raise UserError(f"{location.name}: cannot use split {wanted!r} of {', '.join(parts)} ({error}).") from error
    return parts[cut.splitname].select(range(cut.from_ or 0, sizes[cut.splitname] if cut.to is None else cut.to))


def _load_from_hub(location: _Location) -> Any:
    """A `Dataset` from the hub, or from `datasets`' cache when the hub cannot be reached."""
    reachable = hub.is_reachable()
    try:
        with contextlib.nullcontext() if reachable else hub.offline():
            return _datasets().load_dataset(location.hub_name, split=location.split)
    except Exception as error:
        if reachable:
            advice = "Check the name, the split and, for a gated data set, HF_TOKEN."
        else:
            advice = f"{hub.ADVICE} Dataset.save_to_disk writes one."
        raise UserError(
            f"{location.name} is no local file or directory, and loading split {location.split!r} of the Hugging Face "
            f"data set {location.hub_name!r} failed ({type(error).__name__}: {error}). {advice}"
        ) from error
