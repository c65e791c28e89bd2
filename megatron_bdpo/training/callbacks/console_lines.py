"""What a run says on the terminal: a line per log interval and evaluation, advice, and the table at its end."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

from megatron_bdpo.display import Table
from megatron_bdpo.training.callbacks.callback import Callback, Record, StepResult
from megatron_bdpo.training.callbacks.progress import LogInterval, Metrics
from megatron_bdpo.training.distributed import is_last_rank
from megatron_bdpo.training.reporting.advice import Advisor
from megatron_bdpo.training.reporting.console import show, width

#: Extras that are shown on the step line, in order, when they are reported: metric -> label.
_EXTRAS = {
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

#: Rows of the table: label, metric, format.
_ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.3f}"),
    ("margin", "rewards/margins", "{:+.4f}"),
    ("reward of chosen", "rewards/chosen", "{:+.4f}"),
    ("reward of rejected", "rewards/rejected", "{:+.4f}"),
    ("log-prob of chosen", "logps/chosen", "{:.2f}"),
    ("log-prob of rejected", "logps/rejected", "{:.2f}"),
)


class ConsoleLines(Callback):
    """Prints from the last rank, as Megatron's own log does."""

    def __init__(self, interval: LogInterval, advisor: Advisor, now: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            now: seconds.
        """
        self._interval, self._advisor, self._now = interval, advisor, now
        self._updates = 0
        self._pace_from: tuple[int, float] | None = None
        """The first logged iteration, and when it ended."""
        self._evaluations: list[Metrics] = []

    def after_step(self, step: StepResult) -> None:
        """An interval of skipped steps alone has no metrics: say so."""
        self._updates += not step.skipped
        if self._interval.ends_at(step.iteration):
            if not self._updates:
                _print(f"{self._place(step.iteration)} | skipped: the gradients overflowed, the loss scale is lowered")
            self._updates = 0

    def after_record(self, record: Record) -> None:
        if record.kind == "evaluation":
            self._evaluations.append(record.values)
            _print(_fitting(f"held out, after step {record.iteration} | {step_line(record.values)}"))
            return
        line = step_line(record.values, self._remaining(record.iteration))
        _print(_fitting(f"{self._place(record.iteration)} | {line}"))
        for advice in self._advisor.observe(record.metrics):
            _print(f"WARNING: {advice}")

    def _place(self, iteration: int) -> str:
        last = self._interval.last_step
        return f"step {iteration:>{len(str(last))}}/{last}"

    def _remaining(self, iteration: int) -> float | None:
        """Seconds to the last step at the pace since the first logged interval, evaluations and all."""
        now = self._now()
        if self._pace_from is None:
            self._pace_from = (iteration, now)
            return None
        first, start = self._pace_from
        return (now - start) / (iteration - first) * (self._interval.last_step - iteration)

    def table(self) -> Table | None:
        """The first and the last evaluation side by side; None unless there are two."""
        if len(self._evaluations) < 2:
            return None
        before, after = self._evaluations[0], self._evaluations[-1]
        title = ["held-out pairs", *(f"step {int(metrics['iteration'])}" for metrics in (before, after))]
        cells = [[label, _shown(form, before[name]), _shown(form, after[name])] for label, name, form in _ROWS]
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
    parts += [f"{label} {metrics[name]:.3f}" for name, label in _EXTRAS.items() if name in metrics]
    return " | ".join(parts)


def _fitting(line: str) -> str:
    """In a terminal, as many of the line's parts as its width has room for; a log file takes them all."""
    columns = width()
    if columns is None or len(line) <= columns:
        return line
    return line[: columns + 1].rpartition(" |")[0] or line


def _print(message: str) -> None:
    if is_last_rank():
        show(message)
