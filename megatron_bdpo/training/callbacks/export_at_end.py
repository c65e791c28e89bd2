"""``--save-hf``, ``--save-hf-merged``: the policy in Hugging Face's formats, once the last step is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.training.callbacks.callback import Callback, Record, Start
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.exporting import save_live


class ExportAtEnd(Callback):
    """Collects what the model's card says of the last evaluation, on the ranks that have it."""

    def __init__(self, arguments: Arguments, lora: LoraConfig | None) -> None:
        """
        Args:
            arguments: of the run.
            lora: the adapters that are trained.
        """
        self._arguments, self._lora, self._base = arguments, lora, ""
        self._model: list[Any] = []
        self._evaluation: Mapping[str, float] = {}

    def after_load(self, start: Start) -> None:
        self._model, self._base = start.model, start.identity.base_weights

    def after_record(self, record: Record) -> None:
        if record.kind == "evaluation":
            self._evaluation = record.values

    def finished(self) -> None:
        """Collective."""
        save_live(self._arguments, self._model, self._evaluation, self._lora, self._base)
