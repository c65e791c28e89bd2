"""A run's metrics as a file for anybody's tools: ``metrics.jsonl`` in the directory of ``--save``.

One JSON object per line: ``kind`` ("step" for a logged interval, "evaluation" for a pass over the held-out pairs),
``iteration``, and the metrics by name. A value that is not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.files import write_whole
from megatron_bdpo.json_shape import parse_json
from megatron_bdpo.training.reporting.console import show

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends records, each at once as one line; a record of the same kind and iteration is written once.

    Args:
        path: the file; made where it is missing.
        iteration: where the run starts. What the file says of later ones belongs to steps that are done again, or, at
            0, to another run: it is dropped.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        self._failed = False
        try:
            kept = [record for record in read(path) if iteration and record["iteration"] <= iteration]
            write_whole(path, "".join(map(_line, kept)))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
        self._written = {(record["kind"], record["iteration"]) for record in kept}

    def append(self, kind: str, record: Mapping[str, float]) -> None:
        """Add one record. A file that cannot be written any more is said once: the run itself does not need it."""
        iteration = int(record["iteration"])
        if (kind, iteration) in self._written:
            return
        values = {name: value if math.isfinite(value) else None for name, value in record.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"kind": kind, **values, "iteration": iteration}))
        except OSError as error:
            if not self._failed:
                show(f"WARNING: {self.path} cannot be written, metrics are lost: {error}")
            self._failed = True
            return
        self._written.add((kind, iteration))


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in its order; none where there is no file.

    A last line that a killed run has not finished is left out.

    Raises:
        UserError: another line is no record; the message names it.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_text("utf-8", errors="replace").split("\n")
    complete, _unfinished = lines[:-1], lines[-1]
    return [_record(path, number, line) for number, line in enumerate(complete, 1)]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "kind" not in record or not isinstance(record.get("iteration"), int):
        raise UserError(
            f"{path}, line {number} is no record of a run's metrics: {line[:60]!r}. Mend the line, or move the file."
        )
    return record
