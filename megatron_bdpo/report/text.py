"""A report for the terminal: 80 columns, no colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.report.comprehension import PERCENTILES, Comprehension, summary
from megatron_bdpo.report.curves import QUARTILES, Curves, Series

COLUMNS = 80
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CELLS = 46


def facts(items: Mapping[str, str]) -> str:
    """``name: value`` lines."""
    return "\n".join(_wrapped(f"{name}: {value}") for name, value in items.items())


def comprehension_text(pairs: Comprehension) -> str:
    """Tables of the distributions, and a histogram of the imbalance in characters."""
    header = ["", "mean", "sd", *(f"p{percentile}" for percentile in (5, 25, 50, 75, 95))]
    kept = [0, 1, *(2 + PERCENTILES.index(percentile) for percentile in (5, 25, 50, 75, 95))]
    rows = [
        [label, *(f"{summary(values)[column]:.3f}" for column in kept)]
        for label, values in pairs.distributions().items()
    ]
    low, high = np.percentile(pairs.difference, [1, 99])
    counts, _ = np.histogram(pairs.difference, np.linspace(low, max(high, low + 1e-9), _CELLS + 1))
    return "\n".join(
        [
            f"comprehension of {len(pairs.ids)} of {pairs.total} pairs, {pairs.unit}; weights and scale at tau "
            f"{pairs.temperature:.4g}",
            "",
            _table([header, *rows], widths=[14, *([9] * (len(header) - 1))]),
            "",
            f"I_w - I_l {low:+.3f} {_blocks(counts)} {high:+.3f}",
        ]
    )


def largest_text(pairs: Comprehension, count: int, texts: Mapping[int, Mapping[str, Any]]) -> str:
    """The most imbalanced pairs; their texts where given."""
    indices = pairs.largest(count)
    lines = [
        f"the {len(indices)} most imbalanced pairs",
        _table([["pair", "I_w", "I_l", "I_w-I_l", "w_w", "scale", "  where"]], widths=[8, 8, 8, 9, 7, 7, 0]),
    ]
    for index in map(int, indices):
        numbers = [pairs.chosen[index], pairs.rejected[index], pairs.difference[index]]
        cells = [f"{pairs.ids[index]}", *(f"{number:+.3f}" for number in numbers)]
        cells += [f"{pairs.weights[index, 0]:.3f}", f"{pairs.scale[index]:.3f}"]
        line = _table([cells], widths=[8, 8, 8, 9, 7, 7])
        lines.append(f"{line}  {_end(pairs.place(index), COLUMNS - len(line) - 2)}")
        for name, value in texts.get(index, {}).items():
            lines.append(_wrapped(f"{name}: {shown_value(value)}", indent=10))
    return "\n".join(lines)


_METRICS = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.3f}"),
    ("margin", "rewards/margins", "{:+.3f}"),
    ("reward chosen", "rewards/chosen", "{:+.3f}"),
    ("reward rejected", "rewards/rejected", "{:+.3f}"),
    ("log-prob chosen", "logps/chosen", "{:.2f}"),
    ("log-prob rejected", "logps/rejected", "{:.2f}"),
    ("gradient norm", "grad_norm", "{:.3g}"),
)
_QUARTILE_METRICS = tuple(
    (f"{label} {quartile.upper()}", f"{metric}/imbalance_{quartile}", form)
    for label, metric, form in _METRICS[1:3]
    for quartile in QUARTILES
)


def curves_text(curves: Curves) -> str:
    """First value, course and last value of every metric."""
    parts = []
    for title, found in (("training", curves.training), ("held out", curves.held_out)):
        rows = [
            _course(label, found[metric], form)
            for label, metric, form in (*_METRICS, *_QUARTILE_METRICS)
            if metric in found
        ]
        if rows:
            some = next(iter(found.values()))
            parts.append(f"{title}, steps {some.iterations[0]} to {some.iterations[-1]}\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _course(label: str, series: Series, form: str) -> str:
    groups = np.array_split(series.values, min(_CELLS - 8, len(series)))
    means = np.array([np.nanmean(group) if np.isfinite(group).any() else np.nan for group in groups])
    low, high = np.nanmin(means, initial=np.inf), np.nanmax(means, initial=-np.inf)
    course = _blocks(np.nan_to_num(means - low, nan=0) + 0.02 * (high - low if high > low else 1))
    first, last = form.format(series.values[0]), form.format(series.values[-1])
    return f"  {label:<18}{first:>9} {course:<{_CELLS - 8}} {last:>9}"


def _blocks(values: npt.ArrayLike) -> str:
    """A bar of characters, the highest value filling its cell; what is above zero is seen."""
    array = np.asarray(values, float)
    highest = array.max(initial=0)
    levels = np.ceil(array / highest * (len(_BLOCKS) - 1)).astype(int) if highest > 0 else np.zeros(len(array), int)
    return "".join(_BLOCKS[level] for level in levels)


def shown_value(value: Any) -> str:
    """A column of a data set as text; messages as their contents by role."""
    if isinstance(value, list):
        return " ".join(f"[{m.get('role')}] {m.get('content')}" if isinstance(m, dict) else str(m) for m in value)
    return str(value)


def _table(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> str:
    """Columns that end at the sum of the widths; the first one is a label, to the left."""
    return "\n".join(
        "".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _wrapped(text: str, indent: int = 2) -> str:
    return textwrap.fill(
        " ".join(text.split()), COLUMNS, initial_indent=" " * (indent - 2), subsequent_indent=" " * indent
    )
