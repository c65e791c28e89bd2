r"""How long a run over a million pairs takes to plan its steps and find its reference scores, and in how much memory.

    python benchmarks/planning.py                       # 1,000,000 pairs of generated lengths, 64 ranks, no model
    python benchmarks/planning.py --pairs 100000 --ranks 8
    python benchmarks/planning.py --pairs 10000 1000000 50000000 --without-scores         # a process each, one table
    python benchmarks/planning.py --pairs 1200000 --answers 4 --seq-length 8192          # all pairs of 200,000 rows

A token store and a directory of reference scores of that size are written first (the tokens themselves as a hole in a
file: zeros). Then the functions of a training run's start run on them, as they do there. Memory is the process's
resident set at its highest within each stage, mapped files that were read included.
"""

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --tokenizer-type NullTokenizer --vocab-size 100"
REFERENCE = {"weights": "0123456789abcdef"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--answers", type=int, default=2, help="of each row, which gives all pairs of them")
    parser.add_argument("--ranks", type=int, default=64, help="data-parallel ranks")
    parser.add_argument("--pairs-per-step", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--eval-share", type=float, default=0.02)
    parser.add_argument(
        "--without-scores", action="store_true", help="make log-probs up instead of reading 58 bytes per pair"
    )
    options = parser.parse_args()
    if len(options.pairs) > 1:
        table(options.pairs, sys.argv)
        return

    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments

    flags = (
        f"{MODEL} --pair-data generated --eval-share {options.eval_share} --pair-epochs 1 --lr 0 "
        f"--pairs-per-step {options.pairs_per_step} --seq-length {options.seq_length}"
    )
    arguments = Arguments.parse(flags.split())
    with tempfile.TemporaryDirectory() as directory, distributed.process_groups(arguments.settings.process):
        arguments.set(reference_cache=str(Path(directory) / "scores"))
        write_store(Path(directory) / "store", options.pairs[0], options.answers)
        measure(arguments, Path(directory) / "store", options.ranks, with_scores=not options.without_scores)


def table(sizes: list[int], words: list[str]) -> None:
    """One process per size, and a table of what their stages took."""
    others = [word for word in words[1:] if word not in {"--pairs", *map(str, sizes)}]
    rows: dict[str, list[str]] = {}
    for pairs in sizes:
        command = [sys.executable, words[0], *others, "--pairs", str(pairs)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for stage, seconds, mib in re.findall(r"^(.+): ([\d.]+) s, highest (\d+) MiB$", said, re.M):
            rows.setdefault(stage, []).append(f"{seconds} s, {mib} MiB")
    print("| | " + " | ".join(f"{pairs:,}" for pairs in sizes) + " |\n|---|" + "---:|" * len(sizes))
    for stage, cells in rows.items():
        print(f"| {stage} | " + " | ".join(cells) + " |")


def measure(arguments, store_directory: Path, ranks: int, *, with_scores: bool) -> None:
    """Run the start of a training and tell about each part."""
    import torch

    from megatron_bdpo.data.packs import lay_out
    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.data.store import PairStore
    from megatron_bdpo.losses import LossFunction, registry
    from megatron_bdpo.training.build_job import plan_job
    from megatron_bdpo.training.reference.options_from_data import decide_options, imbalance_edges
    from megatron_bdpo.training.reference.precomputed import PrecomputedReference
    from megatron_bdpo.training.reporting.job_description import describe_job
    from megatron_bdpo.training.setup import RunSetup

    def no_model() -> list:
        raise AssertionError("nothing is to be scored")

    torch.set_num_threads(1)
    loss = LossFunction(registry.get("bdpo"), registry.build_options("bdpo", {"bdpo_temperature": "auto"}))
    planned = arguments.copy()
    planned.set(world_size=ranks)
    with told("open the token store"):
        pool = PairPool([PairStore.open(store_directory)])
    with told("plan one epoch"):
        job = plan_job(planned.settings, loss, pool, None)
    print(describe_job(job), flush=True)
    with told(f"open the store on {ranks} ranks and lay out a pack on each"):
        for rank in range(ranks):
            own, step = PairPool([PairStore.open(store_directory)]), len(job.plan.steps) // 2
            first = job.plan.packs(step, rank)[0]
            lay_out([own.group(each).group for each in first], int(job.plan.lengths[step, 0]))
            del own
    with told("order the pairs by their first use"):
        in_use = job.groups_in_use(0)
    if with_scores:
        setup = RunSetup(arguments, arguments.settings, job, None, None, None, resumed=False)  # type: ignore[arg-type]
        log_probs = PrecomputedReference(setup, REFERENCE, in_use, no_model, pause=lambda: None)
        write_log_probs(log_probs)
        with told("look the reference scores up"):
            values = log_probs.table()
    else:
        values = made_up(pool.pairs.lengths)
    with told("compute the temperature and the quartiles of the imbalance"):
        pairs = values.training_values(job)
        of = len(job.train.ids)
        del job, values, in_use  # a training run keeps them: some 100 bytes per pair, known from the lines above
        loss, _ = decide_options(loss, pairs, of, {})
        imbalance_edges(loss, pairs, of, [])


def made_up(lengths):
    """Log-probs of any size."""
    from megatron_bdpo.training.reference.passes import ReferenceTable

    rng = np.random.default_rng(1)

    def values():
        drawn = rng.uniform(-3, -1, (len(lengths), 2))
        drawn *= lengths[:, 1:]
        return drawn

    return ReferenceTable(values(), values())


def write_store(directory: Path, pairs: int, answers: int) -> None:
    """A token store of ``pairs`` log-normal lengths: prompts of 200 tokens, answers of 150, in the median."""
    from megatron_bdpo.data.row_report import DataReport
    from megatron_bdpo.data.store import FORMAT_NAME, FORMAT_VERSION

    rng = np.random.default_rng(0)
    compared = np.array(list(itertools.combinations(range(1, answers + 1), 2)))
    rows = pairs // len(compared)
    pairs = rows * len(compared)
    medians, spread = np.array([200, *[150] * answers], "<f4"), np.array([0.8, *[0.7] * answers], "<f4")
    parts = np.concatenate(
        [
            np.clip(medians * np.exp(spread * rng.standard_normal((len(part), 1 + answers), "<f4")), 1, 1300).astype(
                "<i4"
            )
            for part in np.array_split(np.empty(rows, bool), -(-rows // 2**20))
        ]
    )
    ends = np.cumsum(parts.ravel(), dtype="<i8").reshape(parts.shape)
    of_pairs = np.concatenate([np.zeros((len(compared), 1), int), compared], axis=1)  # prompt, chosen, rejected
    report = DataReport(["generated"], rows_read=[pairs], pairs_kept=[pairs])
    columns = {
        "starts": np.ascontiguousarray((ends - parts)[:, of_pairs]).reshape(-1, 3),
        "lengths": np.ascontiguousarray(parts[:, of_pairs]).reshape(-1, 3),
        "source": np.zeros(pairs, "<i2"),
        "row": np.repeat(np.arange(1, rows + 1, dtype="<i8"), len(compared)),
        "unsafe": np.full((pairs, 2), -1, "<i1"),
        "label": np.full(pairs, -1, "<i1"),
        "prompt_of": np.full(pairs, -1, "<i4"),
        **{name: np.zeros(0, "<f8") for name in ("reference", "margin", "score")},
        **{name: np.zeros(0, "<i8") for name in ("context", "own_prompts", "own_lengths")},
    }
    totals = int(parts.sum(dtype="<i8"))
    directory.mkdir()
    arrays = {"tokens": {"rows": totals, "crc32": 0}}
    with (directory / "tokens.bin").open("wb") as file:
        file.truncate(4 * totals)
    for name, values in columns.items():
        values.tofile(directory / f"{name}.bin")
        arrays[name] = {"rows": len(values), "crc32": zlib.crc32(values)}
    meta = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "fingerprint": "0" * 64,
        "settings": {"data": ["generated"]},
        "empty_prompt": [1],
        "sources": [{"path": "generated", "weight": 1.0}],
        "report": report.to_json(),
        "arrays": arrays,
    }
    (directory / "meta.json").write_text(json.dumps(meta))


def write_log_probs(log_probs) -> None:
    """Fill the directory that the look-up will read."""
    store = log_probs.setup.job.pool.stores[0]
    cache = log_probs._open(log_probs.directory(0), store)
    rng = np.random.default_rng(1)
    tokens = store.lengths[:, 1:]
    known = {kind: -tokens * rng.uniform(1, 3, tokens.shape) for kind in ("conditional", "unconditional")}
    for rows in np.array_split(rng.permutation(len(store)), 100):
        columns = {"tokens": tokens[rows], "source": store.source[rows], "row": store.row[rows]}
        cache.add(rows, {**{kind: values[rows] for kind, values in known.items()}, **columns}, len(store))


@contextlib.contextmanager
def told(what: str):
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is now that of this moment
    start = time.perf_counter()
    yield
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    mib = int(line.split()[1]) // 2**10
    print(f"{what}: {time.perf_counter() - start:.2f} s, highest {mib} MiB", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
