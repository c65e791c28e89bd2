r"""What a step costs as pairs, sequences, vocabulary and layers grow, and where its time goes.

    python benchmarks/scaling.py --csv scaling.csv

DPO on made-up pairs, one process per point, each of which differs from the first in one size. Time is processor time on
a CPU, which hardly depends on who else is busy, and wall clock on a GPU. MFU is the model's own arithmetic (without
padding, and without the logits that the fused log-probs make a second time) over what the device does in a product of
large matrices of the same type, measured in the same process. The shares of operations that padding and repeated
prompts would have are those of the job's packs, and of sequences padded to the longest of a step's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.common import flops, jobs, models, rounds
from benchmarks.common.gauges import MIB, Instant
from benchmarks.common.sections import NAMES, Sections

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(
    shape: dict[str, int], prompt: int, response: int, steps: int, warm_up: int, dtype: str, pairs_per_step: int
) -> rounds.Record:
    """One point, in the child process."""
    device, sizes = "cuda" if torch.cuda.is_available() else "cpu", models.Shape(**shape)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        model = models.make_model(sizes, work / "model")
        lengths = models.Lengths(prompt, response)
        data = models.make_pairs(lengths, pairs_per_step * steps, sizes.vocab, work / "pairs.jsonl")
        argv = jobs.flags(
            *(model, data, work / "cache"),
            pairs_per_step=pairs_per_step,
            steps=steps,
            dtype=dtype,
            pack=max(4096, 4 * (prompt + response)),
            max_prompt_length=2 * prompt,
        )
        from megatron_bdpo.platform.boot import prepare_platform

        prepare_platform()
        sections, seconds = Sections(), dict[str, float]()

        def after_step(done: int) -> None:
            if done == warm_up:
                sections.reset()
            elif done == steps:
                seconds.update(sections.close())

        with sections.of_a_job():
            measured = jobs.run(argv, device, after_step=after_step)
    timed = steps - warm_up
    figures = measured.figures(warm_up)
    step_seconds = figures["step_seconds" if device == "cuda" else "step_processor_seconds"]
    return {
        **figures,
        **{f"{name}_seconds_a_step": seconds[name] / timed for name in NAMES},
        **{f"{name}_share": seconds[name] / sum(seconds.values()) for name in NAMES},
        "seconds": step_seconds,
        "reference_seconds": measured.reference,
        **shares(sizes, measured, warm_up, step_seconds, gemm_rate(device, DTYPES[dtype])),
    }


def shares(
    shape: models.Shape, measured: jobs.Measured, warm_up: int, step_seconds: float, gemm: float
) -> dict[str, float]:
    """Operations of a step, what part of them padding and repeated prompts have or would have, and the rate."""
    lengths = measured.lengths[warm_up:]
    timed = len(lengths)
    needed, repeated = (flops.work(shape, lengths, share_prompts=shared).total / timed for shared in (True, False))
    per_token = 2.0 * flops.TRAINING * shape.layers * shape.layer_weights
    padding = per_token * (measured.positions - flops.tokens(lengths, share_prompts=True) / timed)
    sequences = (lengths[..., :1] + lengths[..., 1:]).reshape(timed, -1)
    padded = per_token * float((sequences.max(axis=1, keepdims=True) - sequences).sum()) / timed
    return {
        "tflop": needed / 1e12,
        "gemm_gflops": gemm / 1e9,
        "mfu": needed / step_seconds / gemm,
        "padding_share": padding / (needed + padding),
        "padding_share_if_padded": padded / (repeated + padded),
        "repeated_prompts_share": 1 - needed / repeated,
    }


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second in a product of square matrices: the best of some."""
    size, repeats = (8192, 20) if device == "cuda" else (1536, 2)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        start = Instant.now()
        for _ in range(repeats):
            left @ right
        stop = Instant.now()
        seconds = stop.wall - start.wall if device == "cuda" else stop.processor - start.processor
        rates.append(2.0 * size**3 * repeats / seconds)
    return max(rates[1:])


# All points


def points(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> settings of a child: the first as the flags have it, then one size after the other."""
    shape = models.shape_of(options)
    base = {
        "shape": asdict(shape),
        "prompt": options.prompt,
        "response": options.response,
        "pairs_per_step": options.pairs_per_step,
    }
    found = {"base": base}
    for pairs in options.pairs:
        found[f"{pairs} pairs a step"] = base | {"pairs_per_step": pairs}
    for factor in options.lengths:
        longer = {"prompt": round(options.prompt * factor), "response": round(options.response * factor)}
        found[f"sequences of {sum(longer.values())} tokens"] = base | longer
    for vocab in options.vocabularies:
        found[f"vocabulary {vocab}"] = base | {"shape": asdict(replace(shape, vocab=vocab))}
    for layers in options.layer_counts:
        found[f"{layers} layers"] = base | {"shape": asdict(replace(shape, layers=layers))}
    return found


def row(name: str, records: list[rounds.Record]) -> list[str]:
    """Of one point: medians over the rounds."""
    own = [record for record in records if record["contender"] == name]

    def of(key: str) -> float:
        return statistics.median(record[key] for record in own)

    return [
        name,
        f"{of('seconds'):.2f}",
        f"{of('tflop'):.3f}",
        f"{of('mfu'):.0%}",
        *(f"{of(f'{section}_share'):.1%}" for section in NAMES),
        f"{of('reference_seconds'):.1f}",
        f"{of('peak') / MIB:.0f}",
        f"{of('fill'):.1%}",
        f"{of('padding_share'):.1%}",
        f"{of('padding_share_if_padded'):.0%}",
        f"{of('repeated_prompts_share'):.0%}",
    ]


TITLE = [
    "",
    "seconds a step",
    "TFLOP",
    "MFU",
    *NAMES,
    "scoring before, s",
    "peak, MiB",
    "fill",
    "padding",
    "padding, if padded",
    "prompts, if repeated",
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, on average")
    parser.add_argument("--response", type=int, default=128, help="tokens of an answer, on average")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--pairs", type=int, nargs="*", default=[4, 16], help="other numbers of pairs a step")
    parser.add_argument("--lengths", type=float, nargs="*", default=[0.5, 2, 4], help="factors of the lengths")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[4096, 64_000], help="other vocabularies")
    parser.add_argument("--layer-counts", type=int, nargs="*", default=[4, 16], help="other numbers of layers")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    models.add_shape_flags(parser)
    rounds.add_flags(parser)
    return parser.parse_args()


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    options = parse()
    job = {name: getattr(options, name) for name in ("steps", "warm_up", "dtype")}
    records: list[rounds.Record] = []
    for each, (name, point) in itertools.product(range(options.rounds), points(options).items()):
        found = rounds.run_child({**point, **job}, threads=options.threads)
        records.append({"contender": name, "round": each, **found})
        rounds.write_csv(options.csv, records)
        print(f"# round {each + 1}, {name}: {found['seconds']:.2f} s, MFU {found['mfu']:.0%}", flush=True)
    rate = np.median([record["gemm_gflops"] for record in records])
    print(
        f"\n{models.shape_of(options)}, {options.dtype}; prompts of {options.prompt} and answers of {options.response} "
        f"tokens, {options.pairs_per_step} pairs a step, {options.rounds} round(s); products of large matrices: "
        f"{rate:.0f} GFLOP/s;\n"
        f"{rounds.machine(options.threads, 'megatron-core')}\n"
    )
    print(rounds.markdown(TITLE, [row(name, records) for name in dict.fromkeys(r["contender"] for r in records)]))


if __name__ == "__main__":
    main()
