r"""The same training in bf16 and in each FP8 recipe: time, memory, how far the first step is off, the losses.

    python benchmarks/fp8.py --csv fp8.csv                          # on a GPU with Transformer Engine, about 1B weights
    python benchmarks/fp8.py --check                                # anywhere: is every variant's command line accepted
    python benchmarks/fp8.py --small --variants bf16 fp16 fp32      # on a CPU

A Llama-shaped model with random weights is made for the purpose. All variants train it on the same pairs in the same
order. Before the first update policy and reference are the same weights, so what their log-probs differ by is rounding:
that is what the tolerances of ``training/step_zero.py`` have to allow. The run goes on when they do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import jobs, models, rounds
from benchmarks.common.gauges import MIB
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.precision import FP8_CAPABILITIES, FP8_MULTIPLES

DTYPES = ("bf16", "fp16", "fp32")
VARIANTS = ("bf16", *FP8_MULTIPLES, "fp16", "fp32")
BASE = "bf16"
EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"

#: Sides that every recipe can quantise.
BILLION = {"hidden": 2048, "layers": 16, "heads": 32, "groups": 8, "ffn": 8192, "vocab": 128256}
SMALL = {"hidden": 256, "layers": 4, "heads": 4, "groups": 2, "ffn": 512, "vocab": 1024}


def command_line(variant: str, directory: str, data: str, steps: int, **job: Any) -> list[str]:
    """The flags of a variant's job."""
    dtype = variant if variant in DTYPES else "bf16"
    argv = jobs.flags(Path(directory) / "model", data, Path(directory) / "work", steps=steps, dtype=dtype, **job)
    return argv if variant in DTYPES else [*argv, "--fp8-format", "hybrid", "--fp8-recipe", variant]


def measure(variant: str, warm_up: int, check: bool, **job: Any) -> rounds.Record:
    """One run, or its dry run, in the child process."""
    argv = command_line(variant, **job)
    if check:
        from megatron_bdpo.training import entry

        try:
            entry.train([*argv, "--dry-run", "1"])
        except SystemExit:
            return {"accepted": True}
    measured = jobs.run(argv, "cuda" if torch.cuda.is_available() else "cpu", judge=False)
    return {
        **measured.figures(warm_up),
        **{f"step_zero_{name}": value for name, value in measured.step_zero.items()},
        "losses": measured.losses,
    }


def reason_against(variant: str) -> str:
    """Why this machine cannot run a variant, or nothing."""
    if variant in DTYPES:
        return ""
    needed = FP8_CAPABILITIES[variant]
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < needed:
        return f"the GPU has not the compute capability {'.'.join(map(str, needed))}"
    return "" if importlib.util.find_spec("transformer_engine") else "Transformer Engine is not installed"


def runnable(variants: list[str]) -> tuple[list[str], dict[str, str]]:
    """Those that this machine can run, and why it cannot run the others.

    Raises:
        UserError: FP8 was asked for, and no recipe of it can run.
    """
    reasons = {variant: reason for variant in variants if (reason := reason_against(variant))}
    recipes = [variant for variant in variants if variant not in DTYPES]
    if recipes and all(recipe in reasons for recipe in recipes):
        raise UserError(
            f"FP8 cannot run here: {reasons[recipes[0]]}. Use --variants bf16 fp32, or --check to see whether the "
            "command lines are accepted; FP8 needs an Ada, Hopper or newer GPU and pip install '.[gpu]'."
        )
    return [variant for variant in variants if variant not in reasons], reasons


def compare(options: argparse.Namespace, variants: list[str], directory: Path) -> list[rounds.Record]:
    """All variants in turn, ``--rounds`` times."""
    models.make_model(models.shape_of(options), directory / "model", options.pair_data)
    names = ("steps", "warm_up", "pairs_per_step", "pack", "max_prompt_length", "check")
    job = {name: getattr(options, name) for name in names}
    records: list[rounds.Record] = []
    for each, variant in itertools.product(range(options.rounds), variants):
        found = rounds.run_child(
            {"variant": variant, "directory": directory, "data": options.pair_data, **job}, threads=options.threads
        )
        records.append({"contender": variant, "round": each, **found})
        if not options.check:
            rounds.write_csv(options.csv, records)
        print(f"# round {each + 1}, {variant}: {summary(found)}", flush=True)
    return records


def summary(found: rounds.Record) -> str:
    """A run in a line."""
    if "accepted" in found:
        return "command line accepted"
    return (
        f"{found['step_seconds']:.3f} s a step, {found['peak'] / MIB:.0f} MiB, step 0 off by "
        f"{found['step_zero_loss']:.1e}, last loss {found['losses'][-1]:.3f}"
    )


def table(records: list[rounds.Record]) -> str:
    """Medians over the rounds; ratios to bf16 within a round; the loss along the way, of the first round."""
    steps = len(records[0]["losses"])
    moments = sorted({max(1, steps * part // 4) for part in (1, 2, 3, 4)})
    rows = []
    for variant in dict.fromkeys(record["contender"] for record in records):
        own = [record for record in records if record["contender"] == variant]
        faster = rounds.ratios(records, "pairs_per_second", variant, BASE)
        smaller = rounds.ratios(records, "peak", variant, BASE)
        rows.append(
            [
                variant,
                f"{rounds.median(records, 'step_seconds', variant):.3f}",
                rounds.spread(faster) if faster else "",
                f"{rounds.median(records, 'peak', variant) / MIB:.0f}",
                rounds.spread(smaller) if smaller else "",
                *(_worst_first_step(own, what) for what in ("loss", "log_ratio")),
                *(f"{around(own[0]['losses'], moment):.3f}" for moment in moments),
            ]
        )
    first_step = ["step 0, loss (share of allowed)", "log-ratio per token (share)"]
    title = ["", "s a step", f"x {BASE}", "peak, MiB", f"x {BASE}", *first_step]
    return rounds.markdown([*title, *(f"loss, step {moment}" for moment in moments)], rows)


def _worst_first_step(records: list[rounds.Record], what: str) -> str:
    seen, share = (max(each[f"step_zero_{name}"] for each in records) for name in (what, f"{what}_share"))
    return f"{seen:.1e} ({share:.1e})"


def around(losses: list[float], moment: int, width: int = 10) -> float:
    """Mean of the steps that end at this one, of which some may be skipped: a step's own loss is of few pairs."""
    taken = [loss for loss in losses[max(0, moment - width) : moment] if not math.isnan(loss)]
    return statistics.fmean(taken) if taken else math.nan


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[BASE, *FP8_MULTIPLES])
    parser.add_argument("--check", action="store_true", help="only whether every command line is accepted; no GPU")
    parser.add_argument("--small", action="store_true", help="a model for a CPU")
    parser.add_argument("--pair-data", type=Path, default=EXAMPLE, help="pairs of strings, JSONL(.gz)")
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--pack", type=int, default=4096, help="greatest length of a pack")
    parser.add_argument("--max-prompt-length", type=int, default=2048, help="tokens; of longer ones the end is kept")
    models.add_shape_flags(parser, **(SMALL if "--small" in sys.argv else BILLION))
    rounds.add_flags(parser)
    return parser.parse_args()


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    options = parse()
    missing: dict[str, str] = {}
    try:
        variants = options.variants
        if not options.check:
            variants, missing = runnable(variants)
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        raise SystemExit(2) from None
    with tempfile.TemporaryDirectory() as directory:
        records = compare(options, variants, Path(directory))
    if not options.check:
        print(
            f"\n{models.shape_of(options)}; {options.pair_data.name}, {options.pairs_per_step} pairs a step, "
            f"{options.steps} steps of which {options.steps - options.warm_up} timed, {options.rounds} round(s);\n"
            f"{rounds.machine(options.threads, 'megatron-core')}\n\n{table(records)}"
        )
    for variant, reason in missing.items():
        print(f"\n{variant}: did not run, {reason}.")


if __name__ == "__main__":
    main()
