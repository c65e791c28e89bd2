"""A run's metrics as a file for anybody's tools: ``metrics.jsonl`` in the directory of ``--save``.

One JSON object per line: ``kind`` ("step" for a logged interval, "evaluation" for a pass over the held-out pairs),
``iteration``, and the metrics by name. A value that is not finite is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bdpo.training.reporting.step_lines import Kind, StepLines, read_lines

NAME = "metrics.jsonl"
_KIND = Kind("metrics", step="iteration", key=("kind",))


class MetricsFile:
    """Appends records, each at once as one line; a record of the same kind and iteration is written once.

    Args:
        path: the file; made where it is missing.
        iteration: where the run starts: see :class:`StepLines`.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._lines = StepLines(path, iteration, _KIND)

    def append(self, kind: str, record: Mapping[str, float]) -> None:
        """Add one record."""
        values = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._lines.add([{"kind": kind, **values, "iteration": int(record["iteration"])}])


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in its order: see :func:`read_lines`.

    Raises:
        UserError: a line is no record; the message names it.
        OSError: the file cannot be read.
    """
    return read_lines(path, _KIND)
