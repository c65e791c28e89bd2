r"""The share of pack positions that hold a token, over pairs per step, ranks, pack lengths and the kernels' multiples.

    python benchmarks/fill.py --pair-data hh_harmless_dev.jsonl.gz

Plans alone: nothing is trained. Lengths are those of a file's pairs, whole, under a tokenizer trained on them, repeated
to as many pairs as there are of the others; and log-normal ones: prompts of 110 tokens, answers of 245 in the median,
nine tenths of them below about three times that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.common import models, rounds
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.step_plan import IntArray, PlanSettings, plan_steps
from megatron_bdpo.errors import UserError

EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"
VOCABULARY = 32_000


def sizes_of_file(path: Path) -> IntArray:
    """[P] pack positions that the pairs of a file take, with whole prompts."""
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from megatron_bdpo.training import distributed, token_stores
    from megatron_bdpo.training.flags.arguments import Arguments

    with tempfile.TemporaryDirectory() as directory:
        models.trained_tokenizer(path, VOCABULARY).save_pretrained(directory)
        arguments = Arguments.parse(
            [
                "--pair-data",
                str(path),
                "--tokenizer-type",
                "HuggingFaceTokenizer",
                "--tokenizer-model",
                directory,
                "--pair-cache-dir",
                f"{directory}/cache",
            ]
        )
        with distributed.process_groups(arguments.settings.process):
            (store,) = token_stores.open_stores(arguments)
            pool = PairPool([store])
            return pool.group_lengths(np.arange(len(pool.grouping))).positions(share_prompts=True)


def made_up_sizes(pairs: int) -> IntArray:
    """[P], log-normal."""
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(4.7, 0.9, pairs).astype(np.int64).clip(4, 2000)
    answers = rng.lognormal(5.5, 0.75, (pairs, 2)).astype(np.int64).clip(4, 1500)
    return prompts + answers.sum(axis=1)


def plan_fill(sizes: IntArray, steps: int, settings: PlanSettings) -> rounds.Record:
    """Of one plan; beside it the fill if all its packs had the longest one's length."""
    fitting = sizes[sizes <= settings.max_pack_length]
    plan = plan_steps(fitting, settings, max(1, min(len(fitting) // settings.pairs_per_step, steps)))
    of_one_length = len(plan.steps) * plan.packs_per_step * plan.longest
    return {
        "fill": plan.fill,
        "fill_of_one_length": float(plan.real_tokens.sum() / of_one_length),
        "packs": plan.microbatches,
        "lengths": len(np.unique(plan.lengths)),
        "shortest": int(plan.lengths.min()),
        "longest": plan.longest,
    }


def records(options: argparse.Namespace) -> list[rounds.Record]:
    """Every combination that has a pair for each rank."""
    from_file = sizes_of_file(options.pair_data)
    data = {
        options.pair_data.name: np.resize(from_file, options.pairs),
        "log-normal": made_up_sizes(options.pairs),
    }
    grid = itertools.product(data, options.pairs_per_step, options.ranks, options.seq_length, options.multiples)
    found = []
    for (name, per_step, ranks, limit, multiple), stages in itertools.product(grid, (1, 4)):
        where: dict[str, Any] = {"data": name, "pairs per step": per_step, "ranks": ranks, "--seq-length": limit}
        where |= {"multiple": multiple, "pipeline": stages}
        try:
            settings = PlanSettings(per_step, ranks, limit, length_multiple=multiple, pipeline_wait=stages - 1.0)
            found.append(where | plan_fill(data[name], options.steps, settings))
        except UserError:  # fewer pairs than ranks
            continue
    return found


def table(found: list[rounds.Record]) -> str:
    """A line per setting, the stages of a pipeline beside."""
    rows = []
    for alone, pipeline in zip(found[::2], found[1::2], strict=True):
        rows.append(
            [
                alone["data"],
                *(str(alone[name]) for name in ("pairs per step", "ranks", "--seq-length", "multiple")),
                f"{alone['fill_of_one_length']:.1%}",
                f"{alone['fill']:.1%}",
                f"{pipeline['fill']:.1%}",
                f"{alone['packs']} of {alone['shortest']} to {alone['longest']}",
            ]
        )
    title = ["lengths", "pairs per step", "ranks", "--seq-length", "multiple"]
    return rounds.markdown([*title, "as the longest", "fill", "with pipeline stages", "packs per rank"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair-data", type=Path, default=EXAMPLE, help="pairs of strings, JSONL(.gz)")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=400, help="at most; an epoch, if that is less")
    parser.add_argument("--pairs-per-step", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64], help="data-parallel")
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--multiples", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--csv", type=Path, help="write one line per plan here")
    options = parser.parse_args()
    found = records(options)
    rounds.write_csv(options.csv, found)
    print(table(found))


if __name__ == "__main__":
    main()
