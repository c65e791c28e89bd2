"""``--save-hf``, ``--save-hf-merged``: the policy in Hugging Face's formats, once the last step is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_bdpo.training.callbacks.callback import Callback, Record, Start
from megatron_bdpo.training.phases import phase


class ExportAtEnd(Callback):
    """Collects what the model's card says of the last evaluation, on the ranks that have it."""

    def __init__(self, export: Callable[[list[Any], Mapping[str, float], str], None]) -> None:
        """
        Args:
            export: given the model's chunks, the metrics, and of adapters the fingerprint of the weights that they
                stand beside, writes what was trained. Collective.
        """
        self._export, self._base = export, ""
        self._model: list[Any] = []
        self._evaluation: Mapping[str, float] = {}

    def after_load(self, start: Start) -> None:
        self._model, self._base = start.model, start.identity.base_weights

    def after_record(self, record: Record) -> None:
        if record.kind == "evaluation":
            self._evaluation = record.values

    def finished(self) -> None:
        """Collective."""
        with phase("export"):
            self._export(self._model, self._evaluation, self._base)
