"""``--save-hf``: the policy as a Hugging Face model, once the last step is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_bdpo.training.callbacks.callback import Callback, Record, Start


class ExportAtEnd(Callback):
    """Collects what the model's card says of the last evaluation, on the ranks that have it."""

    def __init__(self, export: Callable[[list[Any], Mapping[str, float]], None]) -> None:
        """
        Args:
            export: given the model's chunks and the metrics, writes the model. Collective.
        """
        self._export = export
        self._model: list[Any] = []
        self._evaluation: Mapping[str, float] = {}

    def after_load(self, start: Start) -> None:
        self._model = start.model

    def after_record(self, record: Record) -> None:
        if record.kind == "evaluation":
            self._evaluation = record.values

    def finished(self) -> None:
        """Collective."""
        self._export(self._model, self._evaluation)
