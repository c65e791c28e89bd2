r"""What it saves to encode a prompt once for both answers, beside what the count of operations promises.

    python benchmarks/sharing.py --pair-data hh_harmless_dev.jsonl.gz --csv sharing.csv

The whole training step with shared prompts and without (``--no-share-prompts``), on made-up pairs whose prompt is 10%
to 90% of a sequence, and on real ones. A process measures both layouts, one after the other; the rounds change their
order. The ideal is the ratio of floating-point operations: the layers' matrices, attention, and the output layer at the
scored positions, which sharing cannot make fewer. The loss is SimPO, whose steps need no reference: nothing else runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.common import flops, jobs, models, rounds

SHARED, PLAIN = "shared", "not shared"
EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"


def measure(case: str, first: str, model: str, data: str, steps: int, warm_up: int, **job: Any) -> rounds.Record:
    """Both layouts, in the child process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    for layout in sorted((SHARED, PLAIN), key=lambda name: name != first):
        with tempfile.TemporaryDirectory() as work:
            argv = jobs.flags(model, data, work, steps=steps, loss=["simpo"], **job)
            measured = jobs.run([*argv, *([] if layout == SHARED else ["--no-share-prompts"])], device)
        found[layout] = {
            **measured.figures(warm_up),
            "losses": measured.losses,
            "lengths": measured.lengths[warm_up:].tolist(),
        }
    return found


def compare(options: argparse.Namespace, directory: Path) -> list[rounds.Record]:
    """Every case, ``--rounds`` times; one record per layout."""
    shape = models.shape_of(options)
    cases = dict(made_up(options, shape, directory))
    cases[options.pair_data.name] = (
        models.make_model(shape, directory / "own", options.pair_data),
        options.pair_data,
    )
    job = {
        name: getattr(options, name)
        for name in ("steps", "warm_up", "pairs_per_step", "dtype", "pack", "max_prompt_length")
    }
    records = []
    for each, (case, (model, data)) in itertools.product(range(options.rounds), cases.items()):
        settings = {"case": case, "first": (SHARED, PLAIN)[each % 2], "model": model, "data": data, **job}
        found = rounds.run_child(settings, threads=options.threads)
        for layout, figures in found.items():
            lengths = np.array(figures.pop("lengths"))
            shared = layout == SHARED
            operations = flops.work(shape, lengths, share_prompts=shared).total
            record = {"case": case, "contender": layout, "round": each, **figures, "operations": operations}
            record["tokens_saved"] = 1 - flops.tokens(lengths, share_prompts=True) / flops.tokens(
                lengths, share_prompts=False
            )
            record["pairs"] = lengths.shape[0] * lengths.shape[1]
            records.append(record)
        rounds.write_csv(options.csv, records)
        print(f"# round {each + 1}, {case}: {row(case, records)}", flush=True)
    return records


def made_up(options: argparse.Namespace, shape: models.Shape, directory: Path) -> Any:
    """(name, (model, data)) of the cases with made-up lengths."""
    if options.shares:
        model = models.make_model(shape, directory / "ids")
    for share in options.shares:
        prompt = round(share / 100 * options.length)
        lengths = models.Lengths(prompt, options.length - prompt)
        count = options.pairs_per_step * options.steps
        data = models.make_pairs(lengths, count, shape.vocab, directory / f"{share}.jsonl")
        yield f"prompts {share}% of {options.length} tokens", (model, data)


def row(case: str, records: list[rounds.Record]) -> list[str]:
    """Of one case: rates, gains and the ideal."""
    own = [record for record in records if record["case"] == case]
    each = {layout: [record for record in own if record["contender"] == layout] for layout in (SHARED, PLAIN)}
    rate = {layout: statistics.median(r["pairs_per_second"] for r in runs) for layout, runs in each.items()}
    # The layouts cut steps of other pairs: operations by the pair.
    ideal = np.divide(*(each[layout][0]["operations"] / each[layout][0]["pairs"] for layout in (PLAIN, SHARED)))
    wall = rounds.ratios(own, "pairs_per_second", SHARED, PLAIN)
    processor = rounds.ratios(own, "pairs_per_processor_second", SHARED, PLAIN)
    return [
        case,
        f"{each[SHARED][0]['tokens_saved']:.1%}",
        f"{rate[PLAIN]:.2f}",
        f"{rate[SHARED]:.2f}",
        rounds.spread(wall),
        rounds.spread(processor),
        f"{ideal:.2f}",
        f"{statistics.median(processor) / ideal:.0%}",
        f"{min(record['fill'] for record in own):.1%}",
    ]


TITLE = [
    "pairs",
    "fewer tokens",
    "pairs/s, not shared",
    "pairs/s, shared",
    "gain",
    "gain by processor time",
    "ideal",
    "of the ideal",
    "fill",
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair-data", type=Path, default=EXAMPLE, help="pairs of strings, JSONL(.gz)")
    parser.add_argument("--shares", type=int, nargs="*", default=[10, 30, 50, 70, 90], help="percent, of made-up pairs")
    parser.add_argument("--length", type=int, default=384, help="of a made-up sequence, on average")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--pack", type=int, default=4096, help="greatest length of a pack")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens; of longer prompts the end is kept")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    models.add_shape_flags(parser, vocab=4096)
    rounds.add_flags(parser, rounds=3)
    return parser.parse_args()


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        records = compare(options, Path(directory))
    print(
        f"\n{models.shape_of(options)}, {options.dtype}; {options.pairs_per_step} pairs a step, {options.steps} steps "
        f"of which {options.steps - options.warm_up} timed, {options.rounds} round(s);\n"
        f"{rounds.machine(options.threads, 'megatron-core')}\n"
    )
    print(rounds.markdown(TITLE, [row(case, records) for case in dict.fromkeys(r["case"] for r in records)]))


if __name__ == "__main__":
    main()
