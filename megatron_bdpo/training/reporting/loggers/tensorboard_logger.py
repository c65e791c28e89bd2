"""TensorBoard, through Megatron's own writer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal


class TensorBoardLogger:
    """See ``Logger``."""

    name = "TensorBoard"
    gets_all = False

    def __init__(self, writer: Any) -> None:
        """
        Args:
            writer: Megatron's ``SummaryWriter``, which Megatron closes.
        """
        self._writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self, state: Literal["finished", "stopped"]) -> None:
        """It is Megatron's."""
