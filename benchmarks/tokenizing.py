r"""Rows to tokens: here with several processes, the bare tokenizer, and TRL's map(num_proc), in one run.

    python benchmarks/tokenizing.py --model runs/smollm2/model --rows 10000 --rows 100000 --processes 2

Rows are made up: a question and two answers of words from the example data, as chat messages, with lengths drawn as
those of common data sets are (a few hundred tokens, a long tail). *Bare* is the tokenizer's own library on the three
texts that a pair takes (prompt, and prompt with either answer, rendered beforehand), one after the other in one
process, times the number of processes: what no program that tokenizes these texts can exceed. TRL's is the function
that its DPOTrainer maps over a data set. Memory is the peak of the main process above what its imports take.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import rounds
from benchmarks.common.gauges import MIB, Instant, PeakMemory

EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"
OURS, BARE, TRL = "ours", "bare", "trl"
#: Median words of prompt and answers; a log-normal tail.
WORDS = (120, 180, 180)
BARE_ROWS = 3000


def rows(count: int) -> Iterator[dict[str, Any]]:
    words = " ".join(json.loads(line)["chosen"] for line in EXAMPLE.open()).split()
    draw = random.Random(1)

    def text(median: int) -> str:
        return " ".join(draw.choices(words, k=max(1, round(median * draw.lognormvariate(0, 0.6)))))

    for number in range(count):
        prompt, chosen, rejected = map(text, WORDS)
        yield {
            "prompt": [{"role": "user", "content": f"{number}: {prompt}"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(count))


def measure(contender: str, model: str, data: str, processes: int) -> rounds.Record:
    """One contender on one file, in the child process."""
    seconds, done, peak, disk = {OURS: _ours, BARE: _bare, TRL: _trl}[contender](model, data, processes)
    return {
        "rows_per_second": done / seconds,
        "rows_per_processor_second": done / (_processor_seconds() - _set_up),
        "seconds": seconds,
        "peak_mib": peak / MIB,
        "disk_mib": disk / MIB,
    }


_set_up = 0.0  # processor seconds before the measured part


def _processor_seconds() -> float:
    """Of this process and those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _begin() -> tuple[PeakMemory, Instant]:
    global _set_up
    _set_up = _processor_seconds()
    return PeakMemory("cpu"), Instant.now()


def _ours(model: str, data: str, processes: int) -> tuple[float, int, float, float]:
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
    from megatron_bdpo.data.sources import SourceSpec
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.token_stores import pair_tokenizer

    arguments = Arguments.parse(["--pair-data", data, "--tokenizer-type", "HuggingFaceTokenizer"])
    arguments.set(tokenizer_model=model)
    tokenizer = pair_tokenizer(arguments)
    with tempfile.TemporaryDirectory() as cache:
        settings = PairDataSettings((SourceSpec(data),), Path(cache), workers=processes)
        memory, start = _begin()
        store = prepare_pairs(settings, tokenizer, progress=False)
        seconds = Instant.now().wall - start.wall
        disk = sum(file.stat().st_size for file in store.directory.iterdir())
        return seconds, len(store), memory.read(), disk


def _bare(model: str, data: str, processes: int) -> tuple[float, int, float, float]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = tokenizer.apply_chat_template
    texts = [
        text
        for row in map(json.loads, Path(data).read_text().splitlines()[:BARE_ROWS])
        for text in (
            rendered(row["prompt"], tokenize=False, add_generation_prompt=True),
            rendered(row["prompt"] + row["chosen"], tokenize=False),
            rendered(row["prompt"] + row["rejected"], tokenize=False),
        )
    ]
    memory, start = _begin()
    for text in texts:
        tokenizer.backend_tokenizer.encode(text)
    seconds = Instant.now().wall - start.wall
    return seconds / processes, len(texts) // 3, memory.read(), 0


def _trl(model: str, data: str, processes: int) -> tuple[float, int, float, float]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as cache:
        dataset = Dataset.from_json(data, cache_dir=cache)
        memory, start = _begin()
        config = DPOConfig(output_dir=cache, dataset_num_proc=processes, max_length=None, bf16=False, use_cpu=True)
        made = DPOTrainer._prepare_dataset(None, dataset, tokenizer, config, "train")
        seconds = Instant.now().wall - start.wall
        return seconds, len(made), memory.read(), sum(file.stat().st_size for file in Path(cache).rglob("*.arrow"))


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory with a Hugging Face tokenizer")
    parser.add_argument("--rows", type=int, action="append", help="of a data set; may be given several times")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", default=[OURS, BARE, TRL])
    rounds.add_flags(parser)
    options = parser.parse_args()
    print(
        "| rows | contender | rows/s | ours is x | by processor time | seconds | peak, MiB | disk, MiB |\n| --: | --- "
        + "| --: " * 6
        + "|"
    )
    with tempfile.TemporaryDirectory() as directory:
        for count in options.rows or [10_000]:
            data = Path(directory) / f"{count}.jsonl"
            write_rows(data, count)
            records = []
            for number in range(options.rounds):
                for contender in options.contenders:
                    settings = {"contender": contender, "model": options.model, "data": data}
                    settings["processes"] = options.processes
                    found = rounds.run_child(settings, threads=options.threads)
                    records.append({"contender": contender, "round": number, **found})
            for contender in options.contenders:
                ratio, by_processor = (
                    rounds.spread(rounds.ratios(records, key, OURS, contender))
                    for key in ("rows_per_second", "rows_per_processor_second")
                )
                middle = {key: rounds.median(records, key, contender) for key in found}
                print(
                    f"| {count:,} | {contender} | {middle['rows_per_second']:,.0f} | {ratio} | {by_processor} "
                    f"| {middle['seconds']:.1f} | {middle['peak_mib']:.0f} | {middle['disk_mib']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
