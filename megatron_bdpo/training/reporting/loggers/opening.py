"""Which loggers a run has, by its settings and by what Megatron has begun."""

from __future__ import annotations

from collections.abc import Callable

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.loggers import mlflow_logger, swanlab_logger
from megatron_bdpo.training.reporting.loggers.logger import LoggedRun, Logger
from megatron_bdpo.training.reporting.loggers.mlflow_logger import MlflowLogger
from megatron_bdpo.training.reporting.loggers.swanlab_logger import SwanlabLogger
from megatron_bdpo.training.reporting.loggers.tensorboard_logger import TensorBoardLogger
from megatron_bdpo.training.reporting.loggers.wandb_logger import WandbLogger
from megatron_bdpo.training.settings import OutputSettings


def open_loggers(output: OutputSettings, run: LoggedRun) -> list[Logger]:
    """All of them, on the last rank, where Megatron's live.

    Raises:
        UserError: one of them cannot be begun.
    """
    found: list[Logger] = []
    if writer := get_tensorboard_writer():
        found.append(TensorBoardLogger(writer))
    if wandb := get_wandb_writer():
        found.append(WandbLogger(wandb))
    if experiment := output.mlflow_experiment:
        found.append(_begun(mlflow_logger.FLAG, lambda: MlflowLogger(experiment, run)))
    if project := output.swanlab_project:
        found.append(_begun(swanlab_logger.FLAG, lambda: SwanlabLogger(project, run)))
    return found


def _begun(flag: str, begin: Callable[[], Logger]) -> Logger:
    try:
        return begin()
    except UserError:
        raise
    except Exception as error:  # of the package, of its network
        told = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(f"{flag}: it cannot be begun: {told}. Mend that, or leave the flag out.") from error
