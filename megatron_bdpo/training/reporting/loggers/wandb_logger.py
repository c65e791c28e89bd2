"""W&B, through Megatron's own run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal


class WandbLogger:
    """See ``Logger``."""

    name = "W&B"
    gets_all = False

    def __init__(self, wandb: Any) -> None:
        """
        Args:
            wandb: the module, with the run that Megatron has begun and ends.
        """
        self._wandb = wandb

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._wandb.log({name: value}, step)

    def close(self, state: Literal["finished", "stopped"]) -> None:
        """It is Megatron's."""
