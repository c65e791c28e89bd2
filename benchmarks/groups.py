r"""Rows of k answers with all their pairs, as groups, as the same pairs one by one, and as these pairs in TRL.

    python benchmarks/groups.py --csv groups.csv
    python benchmarks/groups.py --answers 7 --rows-per-step 4                          # as Nectar's
    python benchmarks/groups.py --dtype bf16 --hidden 2048 --layers 16 --heads 32 --groups 8 --ffn 8192 --vocab 128256 \
        --rows-per-step 16 --pack 8192 --trl-batch 12                                  # a GPU

Made-up rows, by default as long as UltraFeedback's on average; every answer has another score, so each row gives
k (k - 1) / 2 pairs. Every step has all rows: all contenders take the same steps, with a mean over pairs (DPO). Timed
are the steps after the warm-up with everything in them; see ``vs_trl`` for what else is alike. Tokens are counted as if
nothing were shared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.common import flops, jobs, models, rounds
from benchmarks.common.gauges import MIB
from benchmarks.vs_trl import run_trl

GROUPS, PAIRS, TRL = "groups", "pairs", "trl"

#: Tokens of UltraFeedback's prompts and answers on average, by SmolLM2's tokenizer, rounded.
ULTRAFEEDBACK = (160, 280)


def make_rows(lengths: tuple[int, int], answers: int, count: int, vocab: int, seed: int) -> list[dict[str, Any]]:
    """Rows of random tokens, for the tokenizer that reads ids; the first answer is the best."""
    rng = np.random.default_rng(seed)

    def part(mean: int) -> str:
        return models.as_text(rng.integers(3, vocab, max(1, int(mean * rng.uniform(0.5, 1.5)))))

    prompt, answer = lengths
    return [
        {
            "prompt": part(prompt),
            "responses": [part(answer) for _ in range(answers)],
            "scores": list(range(answers, 0, -1)),
        }
        for _ in range(count)
    ]


def pairs_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """All of a row, the better answer chosen."""
    both = itertools.combinations(row["responses"], 2)
    return [{"prompt": row["prompt"], "chosen": better, "rejected": worse} for better, worse in both]


def write(rows: list[dict[str, Any]], directory: Path) -> dict[str, Path]:
    """The rows as each contender takes them."""
    files = {GROUPS: rows, PAIRS: [pair for row in rows for pair in pairs_of(row)]}
    for name, made in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    return {name: directory / f"{name}.jsonl" for name in files}


def measure(
    contender: str, directory: str, rows: int, pairs: int, steps: int, warm_up: int, trl_batch: int | None, **job: Any
) -> rounds.Record:
    """One run, in the child process."""
    device, own, pairs_file = "cuda" if torch.cuda.is_available() else "cpu", Path(directory), "pairs.json"
    if contender == TRL:
        figures, _ = run_trl(
            own, json.loads((own / pairs_file).read_text()), warm_up, device, job["dtype"], batch=trl_batch
        )
        return figures
    with tempfile.TemporaryDirectory() as work:
        unit = rows if contender == GROUPS else pairs
        settings = {"pairs_per_step": unit, "steps": steps, "max_prompt_length": 10**6, **job}
        argv = jobs.flags(own / "model", own / f"{contender}.jsonl", work, **settings)
        argv[argv.index("--max-pairs") + 1] = str(pairs)
        more = ["--pairs-from", "all", "--mean-over", "pairs"] if contender == GROUPS else []
        measured = jobs.run([*argv, *more], device, keep_pairs=contender == PAIRS)
    if contender == PAIRS:
        (own / pairs_file).write_text(json.dumps(measured.pairs))
    return {**measured.figures(warm_up), "losses": measured.losses, "positions": measured.positions}


def compare(options: argparse.Namespace, directory: Path) -> list[rounds.Record]:
    """All contenders in turn, ``--rounds`` times."""
    shape = models.shape_of(options)
    rows = make_rows(options.lengths, options.answers, options.rows_per_step, shape.vocab, seed=1)
    files = write(rows, directory)
    stored = "bfloat16" if options.dtype == "bf16" else "float32"
    models.make_model(shape, directory / "model", None, dtype=stored)
    job = {name: getattr(options, name) for name in ("steps", "warm_up", "dtype", "pack", "trl_batch")}
    job |= {"rows": len(rows), "pairs": sum(1 for _ in files[PAIRS].open()), "directory": directory}
    records: list[rounds.Record] = []
    for each, contender in itertools.product(range(options.rounds), options.contenders):
        found = rounds.run_child({"contender": contender, **job}, threads=options.threads)
        records.append({"contender": contender, "round": each, **found})
        rounds.write_csv(options.csv, records)
        told = f"{found['pairs_per_second']:.2f} pairs/s, {found['peak'] / MIB:.0f} MiB"
        print(f"# round {each + 1}, {contender}: {told}", flush=True)
    return records


def ideal(shape: models.Shape, rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times more the pairs one by one take than the groups: operations, and positions."""
    grouped = np.array([[_tokens(row["prompt"]), *(_tokens(each) + 1 for each in row["responses"])] for row in rows])
    answers = itertools.combinations(range(1, grouped.shape[1]), 2)
    paired = np.concatenate([grouped[:, [0, better, worse]] for better, worse in answers])
    work = [flops.work(shape, each, share_prompts=True).total for each in (paired, grouped)]
    positions = [flops.tokens(each, share_prompts=True) for each in (paired, grouped)]
    return {"operations": work[0] / work[1], "positions": positions[0] / positions[1]}


def _tokens(text: str) -> int:
    return text.count("<")


def table(records: list[rounds.Record]) -> str:
    """Medians over the rounds; groups over each, within a round."""
    by_round = {record["round"]: record["losses"] for record in records if record["contender"] == GROUPS}
    lines = []
    for name in dict.fromkeys(record["contender"] for record in records):
        own = [record for record in records if record["contender"] == name]
        difference = max(np.abs(np.subtract(record["losses"], by_round[record["round"]])).max() for record in own)
        lines.append(
            [
                name,
                f"{rounds.median(records, 'pairs_per_second', name):.2f}",
                rounds.spread(rounds.ratios(records, "pairs_per_second", GROUPS, name)),
                rounds.spread(rounds.ratios(records, "pairs_per_processor_second", GROUPS, name)),
                f"{statistics.median(each['positions'] for each in own):,.0f}" if "positions" in own[0] else "",
                f"{rounds.median(records, 'peak', name) / MIB:.0f}",
                f"{rounds.median(records, 'reference_seconds', name):.1f}",
                f"{difference:.1e}",
            ]
        )
    title = ["", "pairs/s", "groups are x", "by processor time", "positions of a step", "peak, MiB"]
    return rounds.markdown([*title, "before the steps, s", "largest difference of a loss"], lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        default=ULTRAFEEDBACK,
        metavar=("PROMPT", "ANSWER"),
        help="tokens on average (default: UltraFeedback's, %(default)s)",
    )
    parser.add_argument("--answers", type=int, default=4, help="of each row")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--trl-batch", type=int, help="pairs that TRL takes at a time (default: the whole step)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--pack", type=int, default=4096, help="greatest length of our packs")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    models.add_shape_flags(parser)
    rounds.add_flags(parser, rounds=2)
    parser.add_argument("--contenders", nargs="+", choices=(GROUPS, PAIRS, TRL), default=[GROUPS, PAIRS, TRL])
    options = parser.parse_args()
    options.contenders.sort(key=[GROUPS, PAIRS, TRL].index)  # TRL takes what the pairs have written
    return options


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        records = compare(options, Path(directory))
    shape = models.shape_of(options)
    rows = make_rows(options.lengths, options.answers, options.rows_per_step, shape.vocab, seed=1)
    expected, prompt_and_answer = ideal(shape, rows), "prompts of {} and answers of {} tokens".format(*options.lengths)
    print(
        f"\nrandom weights: {asdict(shape)}, {options.dtype}; {options.rows_per_step} rows a step of {options.answers} "
        f"answers with all their pairs, {prompt_and_answer}, {options.steps} steps of which "
        f"{options.steps - options.warm_up} timed, {options.rounds} round(s);\nby arithmetic pairs one by one take "
        f"{expected['positions']:.2f} times the positions and {expected['operations']:.2f} times the operations;\n"
        f"{rounds.machine(options.threads, 'megatron-core', 'trl', 'transformers')}\n"
    )
    print(table(records))


if __name__ == "__main__":
    main()
