"""Hands metrics to TensorBoard, W&B, MLflow, SwanLab: all of them, or what Megatron does not send there itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from megatron_bdpo.training.callbacks.callback import Callback, Record, Start
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank
from megatron_bdpo.training.reporting.console import show
from megatron_bdpo.training.reporting.loggers.logger import Logger
from megatron_bdpo.training.reporting.quartiles import is_of_a_quartile


class Scalars(Callback):
    """Does nothing where there is no logger. All live on the last rank. One that fails is left out from then on."""

    def __init__(self, open_loggers: Callable[[bool], list[Logger]]) -> None:
        """
        Args:
            open_loggers: given whether the run goes on, begins them; may raise UserError.
        """
        self._open = open_loggers
        self._loggers: list[Logger] = []

    def after_load(self, start: Start) -> None:
        """Collective.

        Raises:
            UserError: on every rank; one cannot be begun.
        """
        with all_ranks_agree():
            if is_last_rank():
                self._loggers = self._open(start.resumed)

    def after_record(self, record: Record) -> None:
        everything, new = all_scalars(record), new_to_megatron(record)
        for logger in tuple(self._loggers):
            values = everything if logger.gets_all else new
            self._try(logger, functools.partial(logger.log, values, record.iteration))

    def finished(self) -> None:
        self._close("finished")

    def stopped(self, iteration: int, reason: str) -> None:
        self._close("stopped")

    def _close(self, state: Literal["finished", "stopped"]) -> None:
        for logger in tuple(self._loggers):
            self._try(logger, functools.partial(logger.close, state))
        self._loggers = []

    def _try(self, logger: Logger, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of a package, of its network: no reason to lose a training run
            self._loggers.remove(logger)
            told = " ".join(f"{type(error).__name__}: {error}".split())
            show(f"WARNING: {logger.name} gets no more metrics, which metrics.jsonl goes on to keep: {told}")


def all_scalars(record: Record) -> dict[str, float]:
    """A record's values, by the names that Megatron gives them."""
    suffix = " validation" if record.kind == "evaluation" else ""
    return {f"{name}{suffix}": value for name, value in {**record.rates, **record.metrics}.items()}


def new_to_megatron(record: Record) -> dict[str, float]:
    """What Megatron has not sent of these metrics: rates, and metrics by quartile of the imbalance."""
    quartiles = {name: value for name, value in record.metrics.items() if is_of_a_quartile(name)}
    return all_scalars(Record(record.kind, record.iteration, quartiles, record.rates))
