"""Sends TensorBoard and W&B what Megatron does not send itself: rates, and metrics by quartile of the imbalance."""

from __future__ import annotations

import math

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_bdpo.training.callbacks.callback import Callback, Record
from megatron_bdpo.training.reporting.quartiles import is_of_a_quartile


class Scalars(Callback):
    """Does nothing where neither is on. Both live on the last rank."""

    def after_record(self, record: Record) -> None:
        tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, value in new_to_megatron(record).items():
            if tensorboard and math.isfinite(value):
                tensorboard.add_scalar(name, value, record.iteration)
            if wandb:
                wandb.log({name: value}, record.iteration)


def new_to_megatron(record: Record) -> dict[str, float]:
    """What Megatron has not sent of these metrics, by the names under which it would."""
    quartiles = {name: value for name, value in record.metrics.items() if is_of_a_quartile(name)}
    suffix = " validation" if record.kind == "evaluation" else ""
    return {f"{name}{suffix}": value for name, value in {**record.rates, **quartiles}.items()}
