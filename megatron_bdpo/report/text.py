"""A report for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.problems import printable
from megatron_bdpo.display import Block, Facts, Table
from megatron_bdpo.report.curves import QUARTILES, Curves, Series
from megatron_bdpo.report.heldout import HeldOutPairs
from megatron_bdpo.report.heldout_labels import TITLES, HeldOutLabels
from megatron_bdpo.report.scored_pairs import PERCENTILES, Comprehension, summary
from megatron_bdpo.training.reporting.generations_file import SideBySide

COLUMNS = 80
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CELLS = 46


def comprehension_blocks(pairs: Comprehension) -> list[Block]:
    """Tables of the distributions, and a histogram of the imbalance in characters."""
    percentiles = (5, 25, 50, 75, 95)
    kept = [0, 1, *(2 + PERCENTILES.index(percentile) for percentile in percentiles)]
    rows = [
        [label, *(f"{summary(values)[column]:.3f}" for column in kept)]
        for label, values in pairs.distributions().items()
    ]
    low, high = np.percentile(pairs.difference, [1, 99])
    counts, _ = np.histogram(pairs.difference, np.linspace(low, max(high, low + 1e-9), _CELLS + 1))
    return [
        f"comprehension of {len(pairs.ids)} of {pairs.total} pairs, {pairs.unit}; weights and scale at tau "
        f"{pairs.temperature:.4g}",
        "",
        Table(["", "mean", "sd", *(f"p{percentile}" for percentile in percentiles)], rows, gap=3),
        "",
        f"I_w - I_l {low:+.3f} {_blocks(counts)} {high:+.3f}",
    ]


def largest_blocks(pairs: Comprehension, count: int, texts: Mapping[int, Mapping[str, Any]]) -> list[Block]:
    """The most imbalanced pairs; their texts where given."""
    titles = ["pair", "I_w", "I_l", "I_w-I_l", "w_w", "scale", "where"]
    indices = [int(index) for index in pairs.largest(count)]
    rows = []
    for index in indices:
        numbers = [pairs.chosen[index], pairs.rejected[index], pairs.difference[index]]
        cells = [f"{pairs.ids[index]}", *(f"{number:+.3f}" for number in numbers)]
        cells += [f"{pairs.weights[index, 0]:.3f}", f"{pairs.scale[index]:.3f}"]
        rows.append([*cells, _end(pairs.place(index), COLUMNS - 52)])
    blocks: list[Block] = [f"the {len(indices)} most imbalanced pairs", Table(titles, rows, left=(6,))]
    for index in indices:
        if index in texts:
            shown = [(name, " ".join(shown_value(value).split())) for name, value in texts[index].items()]
            blocks += ["", f"pair {pairs.ids[index]}", Facts(shown)]
    return blocks


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


def curves_blocks(curves: Curves) -> list[Block]:
    """First value, course and last value of every metric."""
    blocks: list[Block] = []
    for title, found in (("training", curves.training), ("held out", curves.held_out)):
        rows = [
            _course(label, found[metric], form)
            for label, metric, form in (*_METRICS, *_QUARTILE_METRICS)
            if metric in found
        ]
        if rows:
            some = next(iter(found.values()))
            steps = f"{title}, steps {some.iterations[0]} to {some.iterations[-1]}"
            blocks += [
                *([""] if blocks else []),
                _courses(rows, steps),
            ]
    return blocks


def heldout_blocks(pairs: HeldOutPairs) -> list[Block]:
    """Margins before and after in numbers, calibration, and whether pairs are right for their length."""
    after, percentiles = pairs.after, (5, 25, 50, 75, 95)
    rows = []
    for each in (pairs.before, after) if pairs.several else (after,):
        margins = (each.margins.mean(), *np.percentile(each.margins, percentiles))
        rows.append([f"step {each.step}", f"{each.right:.3f}", *map(_signed, margins)])
    titles = ["", "right", "margin", *(f"p{percentile}" for percentile in percentiles)]
    bins = [[f"{each.predicted:.3f}", f"{each.right:.3f}", f"{each.pairs}"] for each in after.calibration()]
    calibration = f"calibration after step {after.step}: mean distance {after.calibration_error:.3f}"
    facts = [
        (f"right where the chosen answer is {which}", f"{share:.3f} of {count}")
        for which, share, count in after.right_by_length()
    ]
    if after.left_out:
        facts.append(("left out, for rewards that are not finite", f"{after.left_out}"))
    blocks: list[Block] = [
        Table(titles, rows, title=f"margins of {len(after.margins)} held-out pairs"),
        "",
        Table(["predicted", "right", "pairs"], bins, left=(), title=calibration),
    ]
    return [*blocks, "", Facts(facts)] if facts else blocks


def labels_blocks(labels: HeldOutLabels) -> list[Block]:
    """Rewards of labelled answers before and after."""
    title = f"rewards of {len(labels.after)} held-out answers, to step {labels.after.step}"
    told = "  apart: share of couples whose desirable answer has the higher reward"
    return [Table(list(TITLES), labels.rows(), title=title), told]


def _signed(value: float) -> str:
    """What rounds to zero has no sign of its own."""
    return f"{round(value, 3) + 0.0:+.3f}"


def answers_blocks(answers: SideBySide) -> list[Block]:
    """The first few prompts, with the first and the last answer; the page has them all."""
    first, last = answers.steps
    blocks: list[Block] = [f"answers to {_few(len(answers.rows))} after step {first}, and after step {last}"]
    for prompt, before, after in answers.rows[:_ANSWERS]:
        told = (("prompt", prompt), (f"step {first}", before), (f"step {last}", after))[: 2 if first == last else 3]
        blocks.append(Facts([(name, printable(" ".join(text.split()), _LONGEST_TEXT)) for name, text in told]))
    return blocks


_ANSWERS, _LONGEST_TEXT = 6, 300


def _few(prompts: int) -> str:
    return f"{prompts} prompts" if prompts <= _ANSWERS else f"the first {_ANSWERS} of {prompts} prompts"


def _courses(rows: list[list[str]], title: str) -> Table:
    return Table(["", "first", "course", "last"], rows, left=(0, 2), whole=(0, 2), title=title)


def _course(label: str, series: Series, form: str) -> list[str]:
    cells = min(_CELLS - 8, len(series))
    groups = np.array_split(series.values, cells)
    means = np.array([np.nanmean(group) if np.isfinite(group).any() else np.nan for group in groups])
    low, high = np.nanmin(means, initial=np.inf), np.nanmax(means, initial=-np.inf)
    course = _blocks(np.nan_to_num(means - low, nan=0) + 0.02 * (high - low if high > low else 1))
    return [label, form.format(series.values[0]), course, form.format(series.values[-1])]


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


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
