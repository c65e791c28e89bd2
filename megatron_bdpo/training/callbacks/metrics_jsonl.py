"""Keeps the metrics in ``metrics.jsonl``, for anybody's tools: see ``reporting.metrics_file``."""

from __future__ import annotations

from pathlib import Path

from megatron_bdpo.training.callbacks.callback import Callback, Record, Start
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank
from megatron_bdpo.training.reporting.metrics_file import NAME, MetricsFile


class MetricsJsonl(Callback):
    """Written by the last rank, which is one of those that have metrics."""

    def __init__(self, save: Path) -> None:
        self._path = save / NAME
        self._file: MetricsFile | None = None

    def after_load(self, start: Start) -> None:
        """Open the file at the step that the run starts from. Collective.

        Raises:
            UserError: on every rank; it cannot be read or written.
        """
        with all_ranks_agree():
            if is_last_rank():
                self._file = MetricsFile(self._path, start.iteration)

    def after_record(self, record: Record) -> None:
        if self._file:
            self._file.append(record.kind, record.values)
