"""What the runs of an ablation measured: rows, tables with their spread over seeds, and the picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.smollm2.rates import generations, rates
from megatron_bdpo.errors import UserError
from megatron_bdpo.report import style

Record = dict[str, Any]

#: The row of what every run starts from, where something is known of it.
BASE = "base"


@dataclass(frozen=True)
class Run:
    """One training run: the start, or a loss with a seed."""

    name: str
    loss: str
    seed: int
    directory: Path
    flags: list[str]


@dataclass(frozen=True)
class Evidence:
    """What a run has left: held-out metrics before and after, means over the last pass of training, the two rates.

    ``start`` is the same for all runs: the first one has it. Without prompts to answer there are no rates.
    """

    start: Record
    end: Record
    last_pass: Record
    rates: Record = field(default_factory=dict)

    def change(self, name: str) -> float:
        return self.end[name] - self.start[name]


@dataclass(frozen=True)
class Measure:
    """A column of a table, and of the picture."""

    key: str
    label: str
    form: str
    of: Callable[[Evidence], float | None]
    title: str
    unit: str
    note: str


MEASURES = (
    Measure(
        "accuracy", "accuracy", "{:.3f}", lambda e: e.end["rewards/accuracies"],
        "Held-out accuracy", "share of pairs",
        "share of held-out pairs whose chosen answer has the higher reward, by the loss's own reward",
    ),
    Measure(
        "gap", "gap", "{:+.3f}", lambda e: e.last_pass["rewards/accuracies"] - e.end["rewards/accuracies"],
        "Training less held-out accuracy", "share of pairs",
        "training accuracy (mean over the last pass, each step before its update) less held-out accuracy: overfitting",
    ),
    Measure(
        "margin", "margin", "{:+.2f}", lambda e: e.change("logps/chosen") - e.change("logps/rejected"),
        "Margin, held out", "nats per pair",
        "held out, in nats: how far the log-probs of chosen and rejected have moved apart; one ruler for all losses",
    ),
    Measure(
        "drift_chosen", "chosen", "{:+.2f}", lambda e: e.change("logps/chosen"),
        "Drift of the chosen log-probs", "nats per response",
        "held out, in nats: change of the chosen answers' log-probs since the start",
    ),
    Measure(
        "drift_rejected", "rejected", "{:+.2f}", lambda e: e.change("logps/rejected"),
        "Drift of the rejected log-probs", "nats per response",
        "the same of the rejected answers",
    ),
    Measure(
        "grad_norm", "gradient", "{:.2f}", lambda e: e.last_pass["grad_norm"],
        "Gradient norm", "L2, mean over the last pass",
        "norm of the gradient before clipping, mean over the last pass",
    ),
    Measure(
        "unsafe_declined", "unsafe declined", "{:.3f}", lambda e: e.rates.get("unsafe declined"),
        "Unsafe requests declined", "share of held-out prompts",
        "share of the held-out unsafe requests whose greedy answer declines, by the rule of examples/smollm2/rates.py",
    ),
    Measure(
        "harmless_answered", "harmless answered", "{:.3f}", lambda e: e.rates.get("harmless answered"),
        "Harmless requests answered", "share of held-out prompts",
        "share of the held-out harmless requests whose greedy answer does not decline",
    ),
)  # fmt: skip


def _of_quartile(name: str, quartile: int) -> Callable[[Evidence], float | None]:
    return lambda e: e.end.get(f"{name}/imbalance_q{quartile}")


#: Held out, by quartile of the training pairs' |I_w - I_l|: Q1 has the least imbalanced pairs.
BY_QUARTILE = tuple(
    Measure(f"{key}_q{quartile}", f"{key} Q{quartile}", form, _of_quartile(name, quartile), "", "", "")
    for key, name, form in (("accuracy", "rewards/accuracies", "{:.3f}"), ("margin", "rewards/margins", "{:+.2f}"))
    for quartile in (1, 2, 3, 4)
)
COLUMNS = (*MEASURES, *BY_QUARTILE)


def evidence(directory: Path, epochs: float, start: Record | None = None) -> Evidence:
    """What a finished run has left in its directory.

    Args:
        epochs: passes over the pairs.
        start: the held-out metrics before, of another run; None: this run's own.
    """
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    steps = [record for record in records if record["kind"] == "step"]
    if len(evaluations) < (2 if start is None else 1) or not steps:
        raise UserError(f"{directory}/metrics.jsonl lacks an evaluation. Delete the directory to train again.")
    total = steps[-1]["iteration"]
    last_pass = [record for record in steps if record["iteration"] > total * (1 - 1 / max(epochs, 1))]
    names = ("rewards/accuracies", "rewards/margins", "loss", "grad_norm")
    means = {name: float(np.mean([record[name] for record in last_pass])) for name in names}
    return Evidence(start or evaluations[0], evaluations[-1], means, _rates(directory, -1))


def _rates(directory: Path, evaluation: int) -> Record:
    """By the answers of an evaluation: its index."""
    if not (directory / "generations.jsonl").exists():
        return {}
    return rates((row["kind"], row["answer"]) for row in generations(directory)[evaluation])


def collect(runs: list[Run], epochs: float) -> list[Record]:
    """A row of measures per run, after one of the base, if its answers are there. The first run has the start."""
    rows: list[Record] = []
    start = evidence(runs[0].directory, epochs).start
    if base := _rates(runs[0].directory, 0):
        found = Evidence({}, {}, {}, base)
        values = {m.key: m.of(found) if m.key in ("unsafe_declined", "harmless_answered") else None for m in COLUMNS}
        rows.append({"loss": BASE, "seed": 0, **values})
    for run in runs:
        found = evidence(run.directory, epochs, start)
        rows.append({"loss": run.loss, "seed": run.seed, **{m.key: m.of(found) for m in COLUMNS}})
    return rows


def summarise(rows: list[Record]) -> dict[str, dict[str, Record]]:
    """Loss -> measure -> mean, standard deviation over seeds (None for one seed), count."""
    result: dict[str, dict[str, Record]] = {}
    for loss in dict.fromkeys(row["loss"] for row in rows):
        result[loss] = {}
        for measure in COLUMNS:
            values = [row[measure.key] for row in rows if row["loss"] == loss and row[measure.key] is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                result[loss][measure.key] = {"mean": float(np.mean(values)), "sd": deviation, "n": len(values)}
    return result


def differences(rows: list[Record]) -> list[Record]:
    """The rows less that of the first loss with the same seed: the order of the pairs, which both had, drops out."""
    rows = [row for row in rows if row["loss"] != BASE]
    first = {row["seed"]: row for row in rows if row["loss"] == rows[0]["loss"]}

    def less(row: Record, key: str) -> float | None:
        value, other = row[key], first[row["seed"]][key]
        return None if value is None or other is None else value - other

    others = [row for row in rows if row["loss"] != rows[0]["loss"]]
    return [row | {measure.key: less(row, measure.key) for measure in COLUMNS} for row in others]


def report(rows: list[Record]) -> str:
    """The tables in Markdown, with what their columns are."""
    trained = [row for row in rows if row["loss"] != BASE]
    seeds = len({row["seed"] for row in trained})
    measures = [m for m in MEASURES if any(row[m.key] is not None for row in rows)]
    parts = [_table(summarise(rows), measures)]
    parts.append(f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed.")
    if other := differences(rows):
        signed = [replace(m, form=m.form.replace("{:.", "{:+.")) for m in measures]
        parts += [f"Difference from {trained[0]['loss']} with the same seed:", _table(summarise(other), signed)]
    parts.append("\n".join(f"- {measure.label}: {measure.note}" for measure in measures))
    if quartiles := [row for row in trained if row["accuracy_q1"] is not None]:
        title = "Held out, by quartile of the training pairs' imbalance |I_w - I_l|, the least imbalanced first:"
        parts += [title, _table(summarise(quartiles), BY_QUARTILE)]
    return "\n\n".join(parts) + "\n"


def _table(summary: dict[str, dict[str, Record]], measures: Sequence[Measure]) -> str:
    lines = ["| loss | " + " | ".join(m.label for m in measures) + " |", "|---|" + "--:|" * len(measures)]
    lines += [
        f"| {loss} | " + " | ".join(_cell(m, cells.get(m.key)) for m in measures) + " |"
        for loss, cells in summary.items()
    ]
    return "\n".join(lines)


def _cell(measure: Measure, cell: Record | None) -> str:
    if cell is None:
        return "–"
    text = measure.form.format(cell["mean"])
    return text if cell["sd"] is None else f"{text} ± {measure.form.format(cell['sd']).lstrip('+')}"


def write(rows: list[Record], output: Path) -> str:
    """Write runs.csv, summary.json and table.md; returns the table's text."""
    with (output / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"losses": summarise(rows), "differences from the first": summarise(differences(rows))}
    (output / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    text = report(rows)
    (output / "table.md").write_text(text, "utf-8")
    return text


#: What the picture shows, with the value that means "nothing": chance, no difference, no change.
PLOTTED = {
    "accuracy": 0.5, "margin": 0.0, "gap": 0.0, "drift_chosen": 0.0, "drift_rejected": 0.0, "grad_norm": None,
    "unsafe_declined": None, "harmless_answered": None,
}  # fmt: skip


def plot(rows: list[Record], path: Path) -> None:
    """Every run as a dot, the mean of a loss's seeds as a line through them, the base as a dashed line."""
    measures = [m for m in MEASURES if m.key in PLOTTED and any(row[m.key] is not None for row in rows)]
    base = next((row for row in rows if row["loss"] == BASE), {})
    rows = [row for row in rows if row["loss"] != BASE]
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    columns = -(-len(measures) // 2)
    with style.grid(2, columns, (3.7 * columns, 1.6 + 0.8 * len(losses)), sharey=True) as (figure, panels):
        for axes, measure in zip(panels, measures, strict=True):
            for place, loss in enumerate(losses):
                values = [row[measure.key] for row in rows if row["loss"] == loss]
                axes.plot(values, [place] * len(values), "o", color=style.CHOSEN, markersize=6, alpha=0.45, mew=0)
                axes.plot(np.mean(values), place, "|", color=style.CHOSEN, markersize=18, mew=2.2)
            nothing = base.get(measure.key) if PLOTTED[measure.key] is None else PLOTTED[measure.key]
            if nothing is not None:
                axes.axvline(nothing, color=style.FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            axes.set_title(measure.title)
            axes.set_xlabel(measure.unit)
            axes.set_yticks(range(len(losses)), losses)
            axes.set_ylim(len(losses) - 0.5, -0.5)
            axes.grid(axis="x")
        path.write_bytes(style.as_png(figure))
