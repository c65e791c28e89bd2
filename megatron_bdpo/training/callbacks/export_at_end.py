"""``--save-hf``, ``--save-hf-merged``, ``--push-to-hub``: the policy in Hugging Face's formats after the last step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_bdpo.training.callbacks.callback import Callback, Record, Start
from megatron_bdpo.training.phases import phase


class ExportAtEnd(Callback):
    """Collects what the model's card says of the last evaluation, on the ranks that have it."""

    def __init__(
        self, export: Callable[[list[Any], Mapping[str, float], str], None], push: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            export: given the model's chunks, the metrics, and of adapters the fingerprint of the weights that they
                stand beside, writes what was trained. Collective.
            push: sends that to where it is wanted. Collective.
        """
        self._export, self._push, self._base = export, push, ""
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
            self._push()
