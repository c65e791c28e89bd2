"""The paper's ablation on data of yours: DPO, DPO+BW, DPO+SF, B-DPO and SimPO from one start, with several seeds.

    python examples/ablation.py                                            # the example's pairs, a tiny model, a CPU
    python examples/ablation.py --pair-data pairs.jsonl.gz --output runs/mine --seeds 5
    python examples/ablation.py --recipe recipes/qwen2_7b.yaml --sft-epochs 0 --launcher "torchrun --nproc-per-node 8" \
        --pair-data train.jsonl --eval-pair-data heldout.jsonl --output runs/qwen2

1. A held-out part is split off, the same for all runs (or given: --eval-pair-data).
2. The recipe's model, from random weights, learns the chosen answers by next-token prediction (--sft-epochs; 0 starts
   from what the recipe names). This is where every run starts, and its reference.
3. Every loss is trained from there with every seed. A seed decides the order of the pairs and nothing else.

Each run is a process of examples/pretrain_bdpo.py; its command is printed and stands in its directory. Finished runs
are not repeated: the same command goes on where it was. Results: runs.csv (a row per run), summary.json, table.md,
ablation.png. DPO is trained as B-DPO with an infinite temperature, which it equals to the bit, because then its
accuracy is reported by quartile of imbalance as well.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bdpo.errors import UserError
from megatron_bdpo.report import style

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "data"

LOSSES = {
    "DPO": ["--preference-loss", "bdpo", "--bdpo-temperature", "inf"],
    "DPO+BW": ["--preference-loss", "bdpo", "--no-bdpo-scale"],
    "DPO+SF": ["--preference-loss", "bdpo", "--no-bdpo-weights"],
    "B-DPO": ["--preference-loss", "bdpo"],
    "SimPO": ["--preference-loss", "simpo"],
}

Record = dict[str, Any]


class AblationError(Exception):
    """Something to put right; the message says what."""


@dataclass(frozen=True)
class Run:
    """One training: the start, or a loss with a seed."""

    name: str
    loss: str
    seed: int
    directory: Path
    flags: list[str]


# What is measured -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """A finished run's metrics: held out before and after, and the means over the last pass of training."""

    start: Record
    end: Record
    last_pass: Record

    def change(self, name: str) -> float:
        return self.end[name] - self.start[name]


@dataclass(frozen=True)
class Measure:
    """A column of the table, and of the picture."""

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
        "accuracy_q1", "accuracy, Q1", "{:.3f}", lambda e: e.end.get("rewards/accuracies/imbalance_q1"),
        "Accuracy, least imbalanced", "share of pairs",
        "held-out accuracy among the least imbalanced pairs: lowest quarter of the training pairs' |I_w - I_l|",
    ),
    Measure(
        "accuracy_q4", "accuracy, Q4", "{:.3f}", lambda e: e.end.get("rewards/accuracies/imbalance_q4"),
        "Accuracy, most imbalanced", "share of pairs",
        "the same among the most imbalanced ones",
    ),
)  # fmt: skip


def evidence(directory: Path, epochs: float) -> Evidence:
    """What a finished run has left in its metrics.jsonl."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    steps = [record for record in records if record["kind"] == "step"]
    if len(evaluations) < 2 or not steps:
        raise AblationError(f"{directory}/metrics.jsonl lacks an evaluation. Delete the directory to train again.")
    total = steps[-1]["iteration"]
    last_pass = [record for record in steps if record["iteration"] > total * (1 - 1 / max(epochs, 1))]
    names = ("rewards/accuracies", "rewards/margins", "loss", "grad_norm")
    means = {name: float(np.mean([record[name] for record in last_pass])) for name in names}
    return Evidence(evaluations[0], evaluations[-1], means)


# Runs -----------------------------------------------------------------------------------------------------------------


def finished(run: Run) -> bool:
    """Whether a run is done. Raises AblationError if its directory was made with other flags."""
    noted = run.directory / "command.txt"
    if noted.exists() and noted.read_text("utf-8") != _command_text(run):
        raise AblationError(
            f"{run.directory} belongs to a run with other settings (command.txt there):\n"
            f"  there: {noted.read_text('utf-8')}\n  here:  {_command_text(run)}\n"
            "Name another --output, or delete it."
        )
    status = run.directory / "status.json"
    return status.exists() and json.loads(status.read_text("utf-8"))["state"] == "finished"


def train(run: Run, launcher: list[str]) -> None:
    """Train one run in a process of its own, unless it is done; a run that was interrupted goes on."""
    if finished(run):
        print(f"{run.name}: done before", flush=True)
        return
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "command.txt").write_text(_command_text(run), "utf-8")
    print(f"{run.name}: {shlex.join([*launcher, *run.flags])}", flush=True)
    with (run.directory / "log.txt").open("a") as log:
        code = subprocess.run([*launcher, *run.flags], stdout=log, stderr=subprocess.STDOUT).returncode
    if code or not finished(run):
        tail = "\n".join((run.directory / "log.txt").read_text("utf-8", errors="replace").splitlines()[-5:])
        raise AblationError(f"{run.name} ended with exit code {code}; see {run.directory}/log.txt:\n{tail}")


def _command_text(run: Run) -> str:
    return shlex.join(run.flags)


def plan(options: argparse.Namespace) -> tuple[Run | None, list[Run]]:
    """The start, if it is to be trained, and the runs."""
    output = options.output
    train_data, held_out = split(options)
    common = [
        "--recipe", str(options.recipe), "--recipe", "{train-iters: null, eval-share: null}",
        "--pair-data", *map(str, train_data), "--eval-pair-data", *map(str, held_out),
        "--pair-cache-dir", str(output / "cache"), "--eval-at-start",
        "--pairs-per-step", str(options.pairs_per_step), "--seq-length", str(options.seq_length),
        "--long-pairs", "drop", *options.flags,
    ]  # fmt: skip

    def run(name: str, loss: str, seed: int, epochs: float, lr: float, own: list[str]) -> Run:
        directory = output / "runs" / name.replace(" ", "-").lower()
        place = ["--save", str(directory), "--load", str(directory), "--save-interval", "1000000"]
        schedule = ["--seed", str(seed), "--pair-epochs", str(epochs), "--lr", str(lr)]
        return Run(name, loss, seed, directory, [*common, *schedule, *own, *place])

    start = None
    begin: list[str] = []
    if options.sft_epochs:
        # ORPO without its odds ratio is the negative log-likelihood of the chosen answers.
        own = ["--preference-loss", "orpo", "--orpo-weight", "0"]
        start = run("start", "start", 1234, options.sft_epochs, options.sft_lr, own)
        begin = ["--pretrained-checkpoint", str(start.directory)]
    runs = []
    for seed in range(1, options.seeds + 1):
        for loss in options.losses:
            own = list(LOSSES[loss])
            if "bdpo" in own:
                own += ["--beta", str(options.beta)]
                own += [] if "inf" in own else ["--bdpo-temperature", options.bdpo_temperature]
            runs.append(run(f"{loss} seed {seed}", loss, seed, options.epochs, options.lr, [*own, *begin]))
    return start, runs


def split(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The training and the held-out data: as given, or a JSONL file in two parts, the same for every run."""
    if options.eval_pair_data or options.pair_data is None:
        given = options.pair_data or [str(EXAMPLE / "train.jsonl")]
        return given, options.eval_pair_data or [str(EXAMPLE / "heldout.jsonl")]
    source = Path(options.pair_data[0])
    if len(options.pair_data) > 1 or not source.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        raise AblationError("to hold out a part, --pair-data has to be one JSONL file. Else give --eval-pair-data.")
    if not source.is_file():
        raise AblationError(f"--pair-data {source}: there is no such file.")
    parts = [options.output / "data" / "train.jsonl", options.output / "data" / "heldout.jsonl"]
    with (gzip.open if source.name.endswith(".gz") else open)(source, "rt", encoding="utf-8") as file:
        lines = [line if line.endswith("\n") else line + "\n" for line in file if line.strip()]
    order = np.random.default_rng(0).permutation(len(lines))
    count = round(len(lines) * options.held_out_share)
    if not 0 < count < len(lines):
        raise AblationError(
            f"--held-out-share {options.held_out_share} of {len(lines)} pairs leaves nothing on a side."
        )
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(parts, (np.sort(order[count:]), np.sort(order[:count])), strict=True):
        path.write_text("".join(lines[row] for row in rows), "utf-8")
    return [str(parts[0])], [str(parts[1])]


# Results --------------------------------------------------------------------------------------------------------------


def collect(runs: list[Run], epochs: float) -> list[Record]:
    """A row of measures per run."""
    rows = []
    for run in runs:
        found = evidence(run.directory, epochs)
        rows.append({"loss": run.loss, "seed": run.seed, **{m.key: m.of(found) for m in MEASURES}})
    return rows


def summarise(rows: list[Record]) -> dict[str, dict[str, Record]]:
    """Loss -> measure -> mean, standard deviation over seeds (None for one seed), count."""
    result: dict[str, dict[str, Record]] = {}
    for loss in dict.fromkeys(row["loss"] for row in rows):
        result[loss] = {}
        for measure in MEASURES:
            values = [row[measure.key] for row in rows if row["loss"] == loss and row[measure.key] is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                result[loss][measure.key] = {"mean": float(np.mean(values)), "sd": deviation, "n": len(values)}
    return result


def differences(rows: list[Record]) -> list[Record]:
    """The rows less that of the first loss with the same seed: the order of the pairs, which both had, drops out."""
    first = {row["seed"]: row for row in rows if row["loss"] == rows[0]["loss"]}

    def less(row: Record, key: str) -> float | None:
        value, other = row[key], first[row["seed"]][key]
        return None if value is None or other is None else value - other

    others = [row for row in rows if row["loss"] != rows[0]["loss"]]
    return [row | {measure.key: less(row, measure.key) for measure in MEASURES} for row in others]


def report(rows: list[Record]) -> str:
    """Both tables in Markdown, with what their columns are."""
    seeds = len({row["seed"] for row in rows})
    parts = [_table(summarise(rows), MEASURES)]
    parts.append(f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed.")
    if other := differences(rows):
        signed = [replace(m, form=m.form.replace("{:.", "{:+.")) for m in MEASURES]
        parts += [f"Difference from {rows[0]['loss']} with the same seed:", _table(summarise(other), signed)]
    parts.append("\n".join(f"- {measure.label}: {measure.note}" for measure in MEASURES))
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


def write(rows: list[Record], output: Path) -> None:
    """runs.csv, summary.json and table.md; the table also to the terminal."""
    with (output / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"losses": summarise(rows), "differences from the first": summarise(differences(rows))}
    (output / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    text = report(rows)
    (output / "table.md").write_text(text, "utf-8")
    print(f"\n{text}")


#: What the picture shows, with the value that means "nothing": chance, no difference, no change.
PLOTTED = {"accuracy": 0.5, "margin": 0.0, "gap": 0.0, "drift_chosen": 0.0, "drift_rejected": 0.0, "grad_norm": None}


def plot(rows: list[Record], path: Path) -> None:
    """Every run as a dot, the mean of a loss's seeds as a line through them."""
    measures = [measure for measure in MEASURES if measure.key in PLOTTED]
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    with style.grid(2, 3, (11, 1.6 + 0.8 * len(losses)), sharey=True) as (figure, panels):
        for axes, measure in zip(panels, measures, strict=True):
            for place, loss in enumerate(losses):
                values = [row[measure.key] for row in rows if row["loss"] == loss]
                axes.plot(values, [place] * len(values), "o", color=style.CHOSEN, markersize=6, alpha=0.45, mew=0)
                axes.plot(np.mean(values), place, "|", color=style.CHOSEN, markersize=18, mew=2.2)
            if (nothing := PLOTTED[measure.key]) is not None:
                axes.axvline(nothing, color=style.FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            axes.set_title(measure.title)
            axes.set_xlabel(measure.unit)
            axes.set_yticks(range(len(losses)), losses)
            axes.set_ylim(len(losses) - 0.5, -0.5)
            axes.grid(axis="x")
        path.write_bytes(style.as_png(figure))


# Command line ---------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "runs" / "ablation", metavar="DIR")
    add("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml", help="model and tokenizer (recipes/tiny.yaml)")
    add("--pair-data", nargs="+", metavar="PATH", help="training pairs (the example's)")
    add("--eval-pair-data", nargs="+", metavar="PATH", help="held-out pairs (default: a part of the training pairs)")
    add("--held-out-share", type=float, default=0.2, help="of --pair-data, without --eval-pair-data (0.2)")
    add("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES), help="rows of the table (all)")
    add("--seeds", type=int, default=3, help="runs per loss (3)")
    add("--sft-epochs", type=float, default=6, help="passes over the chosen answers before; 0: the recipe's start (6)")
    add("--sft-lr", type=float, default=1e-3, help="learning rate of that (1e-3)")
    add("--epochs", type=float, default=3, help="passes over the pairs (3)")
    add("--lr", type=float, default=1e-4, help="learning rate of the preference runs (1e-4)")
    add("--pairs-per-step", type=int, default=32, help="(32)")
    add("--seq-length", type=int, default=512, help="positions of a pack; longer pairs are left out (512)")
    add("--beta", type=float, default=0.1, help="of all but SimPO, which keeps its own default (0.1)")
    add("--bdpo-temperature", default="auto", metavar="TAU", help="see docs/comprehension.md (auto)")
    add("--launcher", default=shlex.quote(sys.executable), help="what runs pretrain_bdpo.py (this Python)")
    add("--jobs", type=int, default=1, help="runs at a time (1)")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="write ablation.png; needs matplotlib")
    add("flags", nargs="*", metavar="-- FLAG ...", help="more flags for every run, after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    launcher = [*shlex.split(options.launcher), str(ROOT / "examples" / "pretrain_bdpo.py")]
    try:
        if options.plot:
            style.require_matplotlib()
        start, runs = plan(options)
        for run in [*([start] if start else []), runs[0]]:  # the first run scores the reference for the others
            train(run, launcher)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: train(run, launcher), runs[1:]))
        rows = collect(runs, options.epochs)
        write(rows, options.output)
        if options.plot:
            plot(rows, options.output / "ablation.png")
    except (AblationError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
