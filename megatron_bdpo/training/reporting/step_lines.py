"""Files of JSON lines that a run adds to at its steps, in one piece over resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import parse_json
from megatron_bdpo.training.reporting.console import show
from megatron_bdpo.user_files import open_regular


class Kind(NamedTuple):
    """What the lines of a file are."""

    what: str
    """For messages: 'metrics'."""
    step: str
    """The column that holds the step, a whole number."""
    key: tuple[str, ...] = ()
    """Columns that tell lines of one step apart. Those with equal values are written together, and once."""


class StepLines:
    """Appends records, each as one line and those of one call at once.

    Args:
        path: the file; made where it is missing.
        step: where the run starts. What the file says of later ones belongs to steps that are done again, or, at 0, to
            another run: it is dropped.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int, kind: Kind) -> None:
        self.path, self._kind = path, kind
        self._failed = False
        self.found: list[dict[str, Any]] = []
        """The records that were there and stay."""
        try:
            self.found = [record for record in read_lines(path, kind) if step and record[kind.step] <= step]
            write_whole(path, "".join(map(_line, self.found)))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
        self._written = set(map(self._key, self.found))

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records. A file that cannot be written any more is said once: the run itself does not need it."""
        new = [record for record in records if self._key(record) not in self._written]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, new)))
        except OSError as error:
            if not self._failed:
                show(f"WARNING: {self.path} cannot be written, {self._kind.what} are lost: {error}")
            self._failed = True
            return
        self._written.update(map(self._key, new))

    def _key(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in (self._kind.step, *self._kind.key))


def read_lines(path: Path, kind: Kind) -> list[dict[str, Any]]:
    """The records of a file, in its order; none where there is no file.

    A last line that a killed run has not finished is left out.

    Raises:
        UserError: another line is no record; the message names it.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    with open_regular(path) as file:
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    complete, _unfinished = lines[:-1], lines[-1]
    return [_record(path, number, line, kind) for number, line in enumerate(complete, 1)]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _record(path: Path, number: int, line: str, kind: Kind) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        record = None
    if not (
        isinstance(record, dict) and isinstance(record.get(kind.step), int) and all(name in record for name in kind.key)
    ):
        raise UserError(
            f"{path}, line {number} is no record of a run's {kind.what}: {line[:60]!r}. Mend the line, or move the "
            "file."
        )
    return record
