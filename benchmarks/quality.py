r"""How long the quality of tokenized pairs takes, and in how much memory.

    python benchmarks/quality.py                        # 1,000,000 pairs and 20,000 held-out ones
    python benchmarks/quality.py --pairs 100000

Stores of random tokens are written first, 4 bytes per token; one pair of a hundred is a copy, one prompt of a hundred
has a token of another one changed. Lengths are log-normal: prompts of 100 tokens, answers of 75, in the median. Memory
is the process's resident set at its highest within each stage, mapped files that were read included.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--held-out", type=int, default=20_000)
    options = parser.parse_args()

    from megatron_bdpo.data.held_out import hold_out
    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.data.quality import DataQuality, leak
    from megatron_bdpo.display import show

    with tempfile.TemporaryDirectory() as directory:
        train = write_store(Path(directory) / "train", options.pairs, seed=0)
        held_out = write_store(Path(directory) / "held_out", options.held_out, seed=1)
        with told("held-out prompts that are trained on, as a training run looks for them"):
            leak(train, held_out)
        with told("held-out rows of whole prompts, as --eval-share draws them"):
            pool = PairPool([train])
            hold_out(np.arange(len(pool.grouping)), pool.prompts.digests(0), 0.02, seed=1)
        with told("all of data stats' quality"):
            found = DataQuality.of(train, held_out)
        show(*found.blocks())


def write_store(directory: Path, pairs: int, seed: int):
    """A store of random tokens."""
    from megatron_bdpo.data.records import PreferenceRecord
    from megatron_bdpo.data.row_report import DataReport
    from megatron_bdpo.data.sources import SourceSpec
    from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
    from megatron_bdpo.data.tokenization import PairTokens
    from megatron_bdpo.data.tokenized_rows import RowsBuilder

    rng = np.random.default_rng(seed)
    medians, spread = np.array([100, 75, 75]), np.array([0.8, 0.7, 0.7])
    record, previous = PreferenceRecord("", "", ""), None
    directory.mkdir()
    with PairStoreWriter(directory) as writer:
        rows = RowsBuilder()
        for row in range(pairs):
            lengths = np.clip(medians * np.exp(spread * rng.standard_normal(3)), 8, 2000).astype(int)
            tokens = rng.integers(0, 32000, lengths.sum(), dtype=np.int32)
            pair = PairTokens(*np.split(tokens, np.cumsum(lengths)[:2]))
            if previous is not None and row % 100 == 50:
                pair = previous
            elif previous is not None and row % 100 == 75:
                pair = PairTokens(previous.prompt.copy(), pair.chosen, pair.rejected)
                pair.prompt[4] += 1
            rows.append(pair, row + 1, record)
            previous = pair
            if row % 10_000 == 9_999:  # what is written needs no memory
                writer.extend(rows.finish(), 0)
                rows = RowsBuilder()
        writer.extend(rows.finish(), 0)
        report = DataReport(["generated"], rows_read=[pairs], pairs_kept=[pairs])
        writer.finish(StoreInfo("0" * 64, {}, [1], (SourceSpec("generated"),), report))
    return PairStore.open(directory)


@contextlib.contextmanager
def told(what: str):
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is now that of this moment
    start, processor = time.perf_counter(), time.process_time()
    yield
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    seconds = f"{time.perf_counter() - start:.1f} s ({time.process_time() - processor:.1f} s of a processor)"
    print(f"{what}: {seconds}, highest {int(line.split()[1]) // 2**10} MiB", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
