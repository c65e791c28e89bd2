"""What a run says and remembers: a line per step and evaluation, their file, TensorBoard and W&B extras, the table."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from torch import Tensor

from megatron_bdpo.display import Table
from megatron_bdpo.training.callbacks.base import Callback, Start, StepResult
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank
from megatron_bdpo.training.reporting.advice import Advisor
from megatron_bdpo.training.reporting.console import show, width
from megatron_bdpo.training.reporting.metrics_file import NAME, MetricsFile
from megatron_bdpo.training.reporting.quartiles import is_of_a_quartile, within_quartiles

Metrics = dict[str, float]

#: Extras that are shown on the step line, in order, when they are reported: metric -> label.
_SHOWN_EXTRAS = {
    "comprehension/chosen": "I_w",
    "comprehension/rejected": "I_l",
    "comprehension/imbalance": "|I_w-I_l|",
    "weights/chosen": "w_w",
    "weights/rejected": "w_l",
    "scale": "scale",
    "nll": "nll",
    "entropy/chosen": "H_w",
    "entropy/rejected": "H_l",
}


@dataclass
class Progress(Callback):
    """Accumulates on the last pipeline stage; prints from the last rank, as Megatron's own log does.

    The records go to ``metrics.jsonl`` as well, on one rank of those that have them.
    """

    log_interval: int
    train_iters: int
    advisor: Advisor
    save: str | None = None
    """Directory of the file."""
    steps: list[Metrics] = field(default_factory=list)
    """One record per logged interval: iteration, means of all metrics, pairs/s and tokens/s."""
    evaluations: list[Metrics] = field(default_factory=list)
    """One record per evaluation."""
    _file: MetricsFile | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0
    _skipped: int = 0
    _seconds: float = 0.0
    _pairs: int = 0
    _tokens: int = 0
    _pace_from: tuple[int, float] | None = None
    """A logged iteration and when it ended."""

    def after_load(self, start: Start) -> None:
        """Open the file of records. Collective."""
        with all_ranks_agree():
            if self.save and is_last_rank():
                self._file = MetricsFile(Path(self.save) / NAME, start.iteration)

    def after_step(self, step: StepResult) -> None:
        """Take in one optimizer step; print and record at every log interval."""
        iteration = step.iteration
        self._skipped += step.skipped
        if not step.skipped:
            for name, value in step.metrics.items():
                self._sums[name] = self._sums.get(name, 0) + value.detach()
            self._count += 1
        self._seconds += step.seconds
        self._pairs += step.pairs
        self._tokens += step.tokens
        if iteration % self.log_interval == 0 or iteration == self.train_iters:
            self._close_interval(iteration)

    def _close_interval(self, iteration: int) -> None:
        if self._sums and self._count:
            names = list(self._sums)
            means = (torch.stack([self._sums[name].double().reshape(()) for name in names]) / self._count).tolist()
            seconds = max(self._seconds, 1e-9)
            rates = {
                "throughput/pairs_per_second": self._pairs / seconds,
                "throughput/tokens_per_second": self._tokens / seconds,
            }
            metrics = within_quartiles(dict(zip(names, means, strict=True)))
            record = {"iteration": float(iteration), **metrics, **rates}
            self.steps.append(record)
            _write_scalars(rates | _quartiles(metrics), iteration)
            if self._file:
                self._file.append("step", record)
            _print_last(_fitting(f"{self._place(iteration)} | {step_line(record, self._remaining(iteration))}"))
            for advice in self.advisor.observe(metrics):
                _print_last(f"WARNING: {advice}")
        elif self._skipped:
            _print_last(f"{self._place(iteration)} | skipped: the gradients overflowed, the loss scale is lowered")
        self._sums, self._count, self._skipped = {}, 0, 0
        self._seconds, self._pairs, self._tokens = 0.0, 0, 0

    def _remaining(self, iteration: int) -> float | None:
        """Seconds to the last step at the pace since the first logged interval, evaluations and all."""
        now = time.perf_counter()
        if self._pace_from is None:
            self._pace_from = (iteration, now)
            return None
        first, start = self._pace_from
        return (now - start) / (iteration - first) * (self.train_iters - iteration)

    def _place(self, iteration: int) -> str:
        return f"step {iteration:>{len(str(self.train_iters))}}/{self.train_iters}"

    def after_evaluation(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """Take in one evaluation."""
        if metrics:
            means = within_quartiles({name: float(value) for name, value in metrics.items()})
            record = {"iteration": float(iteration), **means}
            self.evaluations.append(record)
            _write_scalars({f"{name} validation": value for name, value in _quartiles(means).items()}, iteration)
            if self._file:
                self._file.append("evaluation", record)
            _print_last(_fitting(f"held out, after step {iteration} | {step_line(record)}"))

    def table(self) -> Table | None:
        """The first and the last evaluation side by side; None unless there are two."""
        if len(self.evaluations) < 2:
            return None
        before, after = self.evaluations[0], self.evaluations[-1]
        title = ["held-out pairs", *(f"step {int(record['iteration'])}" for record in (before, after))]
        rows = [
            ("loss", "loss", "{:.4f}"),
            ("accuracy", "rewards/accuracies", "{:.3f}"),
            ("margin", "rewards/margins", "{:+.4f}"),
            ("reward of chosen", "rewards/chosen", "{:+.4f}"),
            ("reward of rejected", "rewards/rejected", "{:+.4f}"),
            ("log-prob of chosen", "logps/chosen", "{:.2f}"),
            ("log-prob of rejected", "logps/rejected", "{:.2f}"),
        ]
        cells = [[label, _shown(form, before[name]), _shown(form, after[name])] for label, name, form in rows]
        return Table(title, cells, gap=4)


def _shown(form: str, value: float) -> str:
    """Formatted; what rounds to zero has no sign, whose side would depend on the layout."""
    text = form.format(value)
    return text if float(text) else form.format(0.0)


def step_line(metrics: Metrics, remaining: float | None = None) -> str:
    """The metrics in one line, the most wanted first. ``remaining`` is in seconds."""
    parts = [
        f"loss {metrics['loss']:.4f}",
        f"accuracy {metrics['rewards/accuracies']:.3f}",
        f"margin {metrics['rewards/margins']:+.4f}",
    ]
    if "throughput/pairs_per_second" in metrics:
        pairs, tokens = metrics["throughput/pairs_per_second"], metrics["throughput/tokens_per_second"]
        parts.append(f"{pairs:.1f} pairs/s {tokens:.0f} tokens/s")
    if remaining is not None:
        parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    parts += [
        f"rewards {metrics['rewards/chosen']:+.4f} {metrics['rewards/rejected']:+.4f}",
        f"logps {metrics['logps/chosen']:.1f} {metrics['logps/rejected']:.1f}",
    ]
    parts += [f"{label} {metrics[name]:.3f}" for name, label in _SHOWN_EXTRAS.items() if name in metrics]
    return " | ".join(parts)


def _fitting(line: str) -> str:
    """In a terminal, as many of the line's parts as its width has room for; a log file takes them all."""
    columns = width()
    if columns is None or len(line) <= columns:
        return line
    return line[: columns + 1].rpartition(" |")[0] or line


def _quartiles(metrics: Metrics) -> Metrics:
    """What Megatron has not written itself."""
    return {name: value for name, value in metrics.items() if is_of_a_quartile(name)}


def _print_last(message: str) -> None:
    if is_last_rank():
        show(message)


def _write_scalars(values: Metrics, iteration: int) -> None:
    """To TensorBoard and W&B where they are on; both live on the last rank."""
    tensorboard: Any = get_tensorboard_writer()
    wandb: Any = get_wandb_writer()
    for name, value in values.items():
        if tensorboard and math.isfinite(value):
            tensorboard.add_scalar(name, value, iteration)
        if wandb:
            wandb.log({name: value}, iteration)
