"""What a run says on the terminal: a line per log interval and evaluation, advice, and the table at its end."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable

from megatron_bdpo.display import BETWEEN, Block, Line, Mood, Table
from megatron_bdpo.training.callbacks.callback import Callback, Record, StepResult
from megatron_bdpo.training.callbacks.progress import LogInterval, Metrics
from megatron_bdpo.training.distributed import is_last_rank
from megatron_bdpo.training.reporting.advice import Advisor
from megatron_bdpo.training.reporting.console import show, tell_status, width

#: What a line is never longer than, unless it is to have all metrics.
COLUMNS = 100

Parts = list[tuple[str, Mood]]

#: Extras that are shown on a wide line, in order, when they are reported: metric -> label.
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

    def __init__(
        self,
        interval: LogInterval,
        advisor: Advisor,
        *,
        wide: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            wide: show all metrics, not only the first few.
            now: seconds.
        """
        self._interval, self._advisor, self._wide, self._now = interval, advisor, wide, now
        self._updates = 0
        self._pace_from: tuple[int, float] | None = None
        """The first logged iteration, and when it ended."""
        self._latest = ""
        """What the status line says of the latest interval."""
        self._evaluations: list[Metrics] = []

    def after_step(self, step: StepResult) -> None:
        """An interval of skipped steps alone has no metrics: say so."""
        self._updates += not step.skipped
        if self._interval.ends_at(step.iteration):
            if not self._updates:
                skipped = "skipped: the gradients overflowed, the loss scale is lowered"
                _print(Line([(self._place(step.iteration), ""), (skipped, "doubtful")]))
            self._updates = 0
        if is_last_rank():
            tell_status(step.iteration, self._interval.last_step, self._latest)

    def after_record(self, record: Record) -> None:
        if record.kind == "evaluation":
            # Megatron evaluates once more when the last step is done, whether or not it has just done so.
            if not self._evaluations or self._evaluations[-1]["iteration"] != record.iteration:
                self._evaluations.append(record.values)
                self._print_metrics(f"held out, after step {record.iteration}", metric_parts(record.values))
            return
        remaining = self._remaining(record.iteration)
        self._latest = BETWEEN.join(text for text, _ in _pace(record.values, remaining))
        self._print_metrics(self._place(record.iteration), metric_parts(record.values, remaining))
        for advice in self._advisor.observe(record.metrics):
            _print(f"WARNING: {advice}")

    def _print_metrics(self, place: str, parts: tuple[Parts, Parts]) -> None:
        first, others = parts
        columns = width()
        line = Line([(place, ""), *first, *others]) if self._wide else Line([(place, ""), *first])
        _print(line.fitting(columns if self._wide else min(columns or COLUMNS, COLUMNS)))

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
        rows = [row for row in _ROWS if row[1] in before]
        cells = [[label, _shown(form, before[name]), _shown(form, after[name])] for label, name, form in rows]
        return Table(title, cells, gap=4)


def _shown(form: str, value: float) -> str:
    """Formatted; what rounds to zero has no sign, whose side would depend on the layout."""
    text = form.format(value)
    return text if float(text) else form.format(0.0)


def metric_parts(metrics: Metrics, remaining: float | None = None) -> tuple[Parts, Parts]:
    """What a line has of the metrics, and what a wide one adds. ``remaining`` is in seconds."""
    loss, margin = metrics["loss"], metrics.get("rewards/margins")
    first: Parts = [
        (f"loss {loss:.4f}", "" if math.isfinite(loss) else "wrong"),
        (f"accuracy {metrics['rewards/accuracies']:.3f}", ""),
    ]
    if margin is not None:  # else all answers have one label; below zero the rejected ones are preferred
        first.append((f"margin {margin:+.4f}", "doubtful" if margin < 0 else ""))
    first += _pace(metrics, remaining)
    others = _of_both(metrics, "rewards", "{:+.4f}") + _of_both(metrics, "logps", "{:.1f}")
    if "throughput/tokens_per_second" in metrics:
        others.insert(0, f"{metrics['throughput/tokens_per_second']:.0f} tokens/s")
    others += [f"{label} {metrics[name]:.3f}" for name, label in _EXTRAS.items() if name in metrics]
    return first, [(text, "") for text in others]


def _of_both(metrics: Metrics, name: str, form: str) -> list[str]:
    """A metric of chosen and rejected, as far as it is there: a reward model has no log-probs."""
    values = [form.format(metrics[key]) for side in ("chosen", "rejected") if (key := f"{name}/{side}") in metrics]
    return [f"{name} {' '.join(values)}"] if values else []


def _pace(metrics: Metrics, remaining: float | None) -> Parts:
    """How fast it goes, and how long it will."""
    parts = []
    if "throughput/pairs_per_second" in metrics:
        parts.append(f"{metrics['throughput/pairs_per_second']:.1f} pairs/s")
    if remaining is not None:
        parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    return [(text, "") for text in parts]


def _print(message: Block) -> None:
    if is_last_rank():
        show(message)
