r"""LoRA beside full fine-tuning, here and in TRL with PEFT: pairs a second, memory, and whether losses are the same.

    python benchmarks/lora.py --pair-data hh_harmless_dev.jsonl.gz --csv lora.csv
    python benchmarks/lora.py --model runs/smollm2/model --pair-data examples/smollm2/pairs/train.jsonl \
        --threads 2 --rounds 1                                                          # a real model

As benchmarks/vs_trl.py in everything that is not adapters: the same pairs in the same order, the same optimizer, the
reference's log-probs computed beforehand. Both sides start from the same adapters, which PEFT makes, beside every
projection of every layer; B is zero, so their policy begins as the reference. Memory is the peak of the whole process
above what its imports take; beside it stand the bytes of the frozen weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import vs_trl
from benchmarks.common import jobs, models, rounds
from benchmarks.common.gauges import MIB

OURS, OURS_LORA, TRL, TRL_LORA = "ours", "ours, LoRA", "trl", "trl, LoRA"
CONTENDERS = (OURS, OURS_LORA, TRL, TRL_LORA)
#: With adapters -> the same without.
FULL = {OURS_LORA: OURS, TRL_LORA: TRL}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(contender: str, directory: str, data: str, steps: int, warm_up: int, **job: Any) -> rounds.Record:
    """One run, in the child process."""
    root = Path(directory)
    adapter = root / "adapter" if contender in FULL else None
    if contender in (OURS, OURS_LORA):
        with tempfile.TemporaryDirectory() as work:
            argv = jobs.flags(root / "model", data, work, steps=steps, dtype="fp32", **job)
            extra = ["--lora-start", str(adapter), "--no-step-zero-check"] if adapter else []
            measured = jobs.run([*argv, *extra], "cpu", keep_pairs=True)
        (root / "pairs.json").write_text(json.dumps(measured.pairs))
        return {**measured.figures(warm_up), "losses": measured.losses}
    pairs = json.loads((root / "pairs.json").read_text())
    figures, _ = vs_trl.run_trl(root, pairs, warm_up, "cpu", "fp32", adapter=adapter)
    return figures


def make_adapter(directory: Path, rank: int) -> None:
    """Adapters of the directory's model, as PEFT begins them."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(directory / "adapter")


def compare(options: argparse.Namespace, directory: Path) -> list[rounds.Record]:
    """All contenders in turn, ``--rounds`` times."""
    shape = vs_trl.shape_of(options)
    if options.model:
        (directory / "model").symlink_to(options.model.resolve())
    else:
        models.make_model(shape, directory / "model", options.pair_data)
    make_adapter(directory, options.rank)
    job = {name: getattr(options, name) for name in ("steps", "warm_up", "pairs_per_step", "pack", "max_prompt_length")}
    records: list[rounds.Record] = []
    for each, contender in itertools.product(range(options.rounds), CONTENDERS):
        settings = {"contender": contender, "directory": directory, "data": options.pair_data, **job}
        found = rounds.run_child(settings, threads=options.threads)
        records.append({"contender": contender, "round": each, **found})
        rounds.write_csv(options.csv, records)
        print(
            f"# round {each + 1}, {contender}: {found['pairs_per_second']:.2f} pairs/s, {found['peak'] / MIB:.0f} MiB",
            flush=True,
        )
    return records


def table(records: list[rounds.Record]) -> str:
    """Medians over the rounds; ratios within a round."""
    rows = []
    for name in dict.fromkeys(record["contender"] for record in records):
        full, ours = FULL.get(name, name), OURS_LORA if name in FULL else OURS
        own = {record["round"]: record["losses"] for record in records if record["contender"] == name}
        theirs = {record["round"]: record["losses"] for record in records if record["contender"] == ours}
        off = max(np.abs(np.subtract(losses, theirs[each])).max() for each, losses in own.items())
        rows.append(
            [
                name,
                f"{rounds.median(records, 'pairs_per_second', name):.2f}",
                rounds.spread(rounds.ratios(records, "pairs_per_second", name, full)),
                rounds.spread(rounds.ratios(records, "pairs_per_processor_second", name, full)),
                rounds.spread(rounds.ratios(records, "pairs_per_second", ours, name)),
                f"{rounds.median(records, 'peak', name) / MIB:.0f}",
                f"{off:.1e}",
            ]
        )
    title = [
        "",
        "pairs/s",
        "x full",
        "by processor time",
        "ours is x",
        "peak, MiB",
        "largest difference of a loss to ours",
    ]
    return rounds.markdown(title, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair-data", type=Path, default=vs_trl.EXAMPLE, help="pairs of strings, JSONL(.gz)")
    parser.add_argument("--model", type=Path, help="a Llama-shaped Hugging Face model with its tokenizer, a directory")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--pack", type=int, default=4096, help="greatest length of our packs")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens; of longer prompts the end is kept")
    models.add_shape_flags(parser)
    rounds.add_flags(parser, rounds=3)
    return parser.parse_args()


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        records = compare(options, Path(directory))
        frozen = sum(file.stat().st_size for file in (Path(directory) / "model").glob("*.safetensors"))
    shape = vs_trl.shape_of(options)
    print(
        f"\n{options.model or 'random weights'}: {asdict(shape)}, fp32; rank {options.rank}; {options.pair_data.name}, "
        f"{options.pairs_per_step} pairs a step, {options.steps} steps of which {options.steps - options.warm_up} "
        f"timed, {options.rounds} round(s); frozen weights: {frozen / MIB:.0f} MiB;\n"
        f"{rounds.machine(options.threads, *vs_trl.PACKAGES, 'peft')}\n"
    )
    print(table(records))


if __name__ == "__main__":
    main()
