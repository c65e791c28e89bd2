"""Adds up the metrics of the steps between two log lines, and hands them on as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bdpo.training.callbacks.callback import Callback, Record, StepResult
from megatron_bdpo.training.reporting.part_means import public_metrics

Metrics = dict[str, float]


@dataclass(frozen=True)
class LogInterval:
    """Which steps end with a log line."""

    steps: int
    """``--log-interval``."""
    last_step: int
    """Of the run: it has a line in any case."""

    def ends_at(self, iteration: int) -> bool:
        return iteration % self.steps == 0 or iteration == self.last_step


class Progress(Callback):
    """Remembers the metrics of the run, on the ranks of the last pipeline stage."""

    def __init__(self, interval: LogInterval) -> None:
        self.interval = interval
        """Between two records of steps."""
        self.listeners: Sequence[Callback] = ()
        """Told of each record as it is made."""
        self.steps: list[Metrics] = []
        """One record per logged interval: iteration, means of all metrics, pairs/s and tokens/s."""
        self.evaluations: list[Metrics] = []
        """One record per evaluation."""
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates = self._pairs = self._tokens = 0
        self._seconds = 0.0

    def after_step(self, step: StepResult) -> None:
        """Take in one optimizer step; of one that was skipped only its time counts."""
        if not step.skipped:
            for name, value in step.metrics.items():
                self._sums[name] = self._sums.get(name, 0) + value.detach()
            self._updates += 1
        self._seconds += step.seconds
        self._pairs += step.pairs
        self._tokens += step.tokens
        if self.interval.ends_at(step.iteration):
            if self._sums:
                self._tell(self.steps, self._record(step.iteration))
            self._begin_interval()

    def _record(self, iteration: int) -> Record:
        names = list(self._sums)
        means = (torch.stack([self._sums[name].double().reshape(()) for name in names]) / self._updates).tolist()
        seconds = max(self._seconds, 1e-9)
        rates = {
            "throughput/pairs_per_second": self._pairs / seconds,
            "throughput/tokens_per_second": self._tokens / seconds,
        }
        return Record("step", iteration, public_metrics(dict(zip(names, means, strict=True))), rates)

    def after_evaluation(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """Take in one evaluation."""
        if metrics:
            means = public_metrics({name: float(value) for name, value in metrics.items()})
            self._tell(self.evaluations, Record("evaluation", iteration, means))

    def _tell(self, remembered: list[Metrics], record: Record) -> None:
        remembered.append(record.values)
        for listener in self.listeners:
            listener.after_record(record)
