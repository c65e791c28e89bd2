"""The paper's ablation: DPO, DPO+BW, DPO+SF, B-DPO and others from one start, with several seeds.

    python examples/ablation.py                                            # the example's pairs, a tiny model, a CPU
    python examples/ablation.py --model smollm2                            # a real pretrained model, examples/smollm2
    python examples/ablation.py --pair-data pairs.jsonl.gz --output runs/mine --seeds 5
    python examples/ablation.py --recipe recipes/qwen2_7b.yaml --sft-epochs 0 --launcher "torchrun --nproc-per-node 8" \
        --pair-data train.jsonl --eval-pair-data heldout.jsonl --output runs/qwen2

1. A share of the pairs is held out, in whole prompts, the same for all runs (or given: --eval-pair-data).
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
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.ablation_results import Run, collect, plot, write
from examples.smollm2 import fetch
from megatron_bdpo.errors import UserError
from megatron_bdpo.report import style

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE, SMOLLM2 = ROOT / "examples" / "data", ROOT / "examples" / "smollm2"

LOSSES = {
    "DPO": ["--preference-loss", "bdpo", "--bdpo-temperature", "inf"],
    "DPO+BW": ["--preference-loss", "bdpo", "--no-bdpo-scale"],
    "DPO+SF": ["--preference-loss", "bdpo", "--no-bdpo-weights"],
    "B-DPO": ["--preference-loss", "bdpo"],
    "B-DPO, τ = 0.25": ["--preference-loss", "bdpo", "--bdpo-temperature", "0.25"],
    "B-DPO, τ = 1": ["--preference-loss", "bdpo", "--bdpo-temperature", "1"],
    "B-DPO, sum": ["--preference-loss", "bdpo", "--bdpo-comprehension", "sum"],
    "SafeDPO": ["--preference-loss", "safedpo"],
    "SimPO": ["--preference-loss", "simpo"],
}
#: The rows where none are named: what any pairs can be trained with.
USUAL = ["DPO", "DPO+BW", "DPO+SF", "B-DPO", "SimPO"]

#: What a recipe may have settled and the ablation settles itself.
OURS = (
    "{train-iters: null, pair-epochs: null, eval-pair-data: null, eval-share: null, eval-seed: null, "
    "eval-at-start: null, beta: null, bdpo-temperature: null}"
)

#: Settings by --model, each of which a flag of its own overrides. A checkpoint of a real model without its optimizer.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "smollm2": {
        "output": ROOT / "runs" / "ablation-smollm2",
        "recipe": SMOLLM2 / "recipe.yaml",
        "pair_data": [str(SMOLLM2 / "pairs" / "train.jsonl")],
        "eval_pair_data": [str(SMOLLM2 / "pairs" / "heldout.jsonl")],
        "losses": list(LOSSES),
        "sft_epochs": 0,
        "epochs": 1,
        "lr": 6e-5,
        "pairs_per_step": 8,
        "seq_length": 1024,
        "own_flags": ["--no-save-optim"],
    },
}

# Runs -----------------------------------------------------------------------------------------------------------------


def finished(run: Run) -> bool:
    """Whether a run is done. Raises UserError if its directory was made with other flags."""
    noted = run.directory / "command.txt"
    if noted.exists() and noted.read_text("utf-8") != _command_text(run):
        raise UserError(
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
        raise UserError(f"{run.name} ended with exit code {code}; see {run.directory}/log.txt:\n{tail}")


def _command_text(run: Run) -> str:
    return shlex.join(run.flags)


def plan(options: argparse.Namespace) -> tuple[Run | None, list[Run]]:
    """The start, if it is to be trained, and the runs."""
    output = options.output
    common = [
        "--recipe", str(options.recipe), "--recipe", OURS, *data_flags(options),
        "--pair-cache-dir", str(output / "cache"),
        "--pairs-per-step", str(options.pairs_per_step), "--seq-length", str(options.seq_length),
        "--long-pairs", "drop", *options.own_flags, *options.flags,
    ]  # fmt: skip

    def run(name: str, loss: str, seed: int, epochs: float, lr: float, own: list[str]) -> Run:
        directory = output / "runs" / re.sub(r"[^\w.+]+", "-", name).lower()
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
    runs: list[Run] = []
    for seed in range(1, options.seeds + 1):
        for loss in options.losses:
            own = list(LOSSES[loss])
            own += [] if "simpo" in own else ["--beta", str(options.beta)]
            if "bdpo" in own and "--bdpo-temperature" not in own:
                own += ["--bdpo-temperature", options.bdpo_temperature]
            own += [] if runs else ["--eval-at-start"]  # before the first step all runs are alike
            runs.append(run(f"{loss} seed {seed}", loss, seed, options.epochs, options.lr, [*own, *begin]))
    return start, runs


def data_flags(options: argparse.Namespace) -> list[str]:
    """The training and the held-out pairs, the same for every seed: as given, or a share of them."""
    if options.eval_pair_data or options.pair_data is None:
        train_data = options.pair_data or [str(EXAMPLE / "train.jsonl")]
        return [
            "--pair-data",
            *train_data,
            "--eval-pair-data",
            *(options.eval_pair_data or [str(EXAMPLE / "heldout.jsonl")]),
        ]
    return ["--pair-data", *options.pair_data, "--eval-share", str(options.held_out_share), "--eval-seed", "0"]


# Command line ---------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="tiny", help="what the other flags' defaults are for (tiny)")
    add("--output", type=Path, default=ROOT / "runs" / "ablation", metavar="DIR")
    add("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml", help="model and tokenizer (recipes/tiny.yaml)")
    add("--pair-data", nargs="+", metavar="PATH", help="training pairs (the example's)")
    add("--eval-pair-data", nargs="+", metavar="PATH", help="held-out pairs (default: a part of the training pairs)")
    add("--held-out-share", type=float, default=0.2, help="of --pair-data, without --eval-pair-data (0.2)")
    add("--losses", nargs="+", choices=tuple(LOSSES), default=USUAL, help="rows of the table (of a tiny model five)")
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
    parser.set_defaults(own_flags=[])
    parser.set_defaults(**MODELS[parser.parse_args(argv).model])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    launcher = [*shlex.split(options.launcher), str(ROOT / "examples" / "pretrain_bdpo.py")]
    try:
        if options.plot:
            style.require_matplotlib()
        if options.model == "smollm2":
            fetch.fetch()
        start, runs = plan(options)
        for run in [*([start] if start else []), runs[0]]:  # the first run scores the reference for the others
            train(run, launcher)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: train(run, launcher), runs[1:]))
        rows = collect(runs, options.epochs)
        print(f"\n{write(rows, options.output)}")
        if options.plot:
            plot(rows, options.output / "ablation.png")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
