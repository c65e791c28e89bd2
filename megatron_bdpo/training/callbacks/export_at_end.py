"""``--save-hf``: the policy as a Hugging Face model, once the last step is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_bdpo.training.callbacks.base import Callback, Start
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.exporting import save_live


class ExportAtEnd(Callback):
    """
    Args:
        evaluations: of the run, where this rank has them; the last one goes on the model's card.
    """

    def __init__(self, arguments: Arguments, evaluations: Sequence[dict[str, float]]) -> None:
        self._arguments, self._evaluations = arguments, evaluations
        self._model: list[Any] = []

    def after_load(self, start: Start) -> None:
        self._model = start.model

    def finished(self) -> None:
        """Collective."""
        save_live(self._arguments, self._model, self._evaluations[-1] if self._evaluations else {})
