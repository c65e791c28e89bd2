r"""The same training here and in TRL's DPOTrainer: pairs a second, memory, and whether the losses are the same.

    python benchmarks/vs_trl.py --pair-data hh_harmless_dev.jsonl.gz --csv vs_trl.csv
    python benchmarks/vs_trl.py --dtype bf16 --hidden 2048 --layers 16 --heads 32 --groups 8 --ffn 8192 --vocab 128256 \
        --lengths 400 200 --pairs-per-step 32 --trl-batch 8 --pack 8192                            # a GPU
    python benchmarks/vs_trl.py --model runs/smollm2/model --pair-data examples/smollm2/pairs/train.jsonl \
        --threads 2 --rounds 1                                                                     # a real model

A Llama-shaped model with random weights is made for the purpose, or --model names one. All contenders train it on the
same pairs in the same order, with the same pairs to a step, optimizer and precision, without recomputation, the
reference's log-probs computed beforehand. Timed are the optimizer steps after the warm-up with everything in them:
data, forward, backward, optimizer, log. In bf16 TRL keeps fp32 weights and computes under autocast; ours are bf16, with
fp32 main copies. Tokens are counted as if nothing were shared or padded, for all contenders alike. MFU is the
arithmetic that a contender's layout needs, without padding, over the peak of the GPU's datasheet. Memory is the peak of
the whole process above what its imports take.
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
import torch

from benchmarks.common import flops, jobs, models, rounds
from benchmarks.common.gauges import MIB, Instant, PeakMemory

OURS, TRL = "ours", "trl"
#: Contender -> settings of TRL's, beside those that all share. ``batch`` is pairs at a time; None: the whole step.
CONTENDERS: dict[str, dict[str, Any]] = {
    OURS: {},
    TRL: {},
    "trl, one pair at a time": {"batch": 1},
    "trl, padding-free": {"padding_free": True},
}
LIGER = {"trl, liger": {"use_liger_kernel": True}}  # Triton kernels: on a GPU

EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"


def measure(
    contender: str,
    directory: str,
    data: str,
    shape: dict[str, int],
    steps: int,
    warm_up: int,
    trl_batch: int | None,
    **job: Any,
) -> rounds.Record:
    """One run, in the child process."""
    device, pairs_file = "cuda" if torch.cuda.is_available() else "cpu", Path(directory) / "pairs.json"
    if contender == OURS:
        with tempfile.TemporaryDirectory() as work:
            argv = jobs.flags(Path(directory) / "model", data, work, steps=steps, **job)
            measured = jobs.run(argv, device, keep_pairs=True)
        pairs_file.write_text(json.dumps(measured.pairs))
        figures = measured.figures(warm_up)
        return {**figures, "losses": measured.losses, **rate(shape, measured.lengths[warm_up:], figures, share=True)}
    settings = (CONTENDERS | LIGER)[contender]
    if contender == TRL:
        settings = {"batch": trl_batch, **settings}
    pairs = json.loads(pairs_file.read_text())
    figures, lengths = run_trl(Path(directory), pairs, warm_up, device, job["dtype"], **settings)
    return figures if "unavailable" in figures else {**figures, **rate(shape, lengths, figures, share=False)}


#: Dense bf16, operations a second, by a part of the GPU's name: of NVIDIA's datasheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def rate(shape: dict[str, int], lengths: Any, figures: rounds.Record, *, share: bool) -> rounds.Record:
    """The arithmetic of the timed steps over what the device could have done in that time; nothing without a GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is None:
        return {}
    operations = flops.work(models.Shape(**shape), lengths, share_prompts=share).total
    return {"mfu": operations / (figures["step_seconds"] * len(lengths)) / peak}


def run_trl(
    directory: Path, steps: list[Any], warm_up: int, device: str, dtype: str, batch: int | None = None,
    adapter: Path | None = None, **settings: Any,
) -> tuple[rounds.Record, Any]:  # fmt: skip
    """Train in TRL on the steps' pairs, which are given as tokens. Returns figures, and the timed steps' lengths.

    Args:
        adapter: train these adapters of PEFT's, and not the whole model.
    """
    import transformers
    import trl
    from datasets import Dataset

    lengths = np.array([[[len(part) for part in pair] for pair in step] for step in steps])
    marks: list[Instant] = []
    losses: list[torch.Tensor] = []
    memory = PeakMemory(device)

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *unused: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *unused: Any, **named: Any) -> None:
            marks.append(Instant.now())

        def on_step_end(self, *unused: Any, **named: Any) -> None:
            marks.append(Instant.now())

    per_step = lengths.shape[1]
    batch = batch or per_step
    with tempfile.TemporaryDirectory() as work:
        start = Instant.now()
        trainer = InOrder(
            loaded(directory / "model", adapter),
            args=trl.DPOConfig(
                **settings,
                beta=0.1,
                max_length=None,
                **({"max_prompt_length": None} if hasattr(trl.DPOConfig, "max_prompt_length") else {}),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=per_step // batch,
                max_steps=len(steps),
                learning_rate=jobs.LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=jobs.WEIGHT_DECAY,
                max_grad_norm=jobs.CLIP,
                optim="adamw_torch",
                gradient_checkpointing=False,
                precompute_ref_log_probs=True,
                bf16=dtype == "bf16",
                use_cpu=device == "cpu",
                output_dir=work,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([as_texts(pair) for pair in itertools.chain.from_iterable(steps)]),
            processing_class=models.id_tokenizer(trained_vocab(directory), end=steps[0][0][1][-1]),
            callbacks=[Clock()],
        )
        if settings.get("padding_free") and not trainer.padding_free:
            reason = f"TRL {trl.__version__} trains with padding when asked for padding_free=True"
            return {"unavailable": reason}, lengths
        trainer.train()
    values = [float(each) for each in losses]
    figures = {
        **jobs.rates(marks[warm_up], marks[-1], lengths[warm_up:]),
        "fill": 1.0 if settings.get("padding_free") else padded_fill(lengths.reshape(-1, batch, 3)),
        "peak": memory.read(),
        "reference_seconds": marks[0].wall - start.wall,
        "losses": np.mean(np.reshape(values, (len(steps), -1)), axis=1).tolist(),
    }
    return figures, lengths[warm_up:]


def loaded(model: Path, adapter: Path | None) -> Any:
    """The policy that TRL trains."""
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        return found
    import peft

    return peft.PeftModel.from_pretrained(found, adapter, is_trainable=True)


def as_texts(pair: list[list[int]]) -> dict[str, str]:
    """A pair for TRL's own tokenization, with the tokenizer that reads ids. TRL puts the last token after answers."""
    prompt, *answers = pair
    texts = [models.as_text(prompt), *(models.as_text(answer[:-1]) for answer in answers)]
    return dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))


def trained_vocab(directory: Path) -> int:
    """Of the model in the directory."""
    return int(json.loads((directory / "model" / "config.json").read_text())["vocab_size"])


def padded_fill(lengths: np.ndarray[Any, Any]) -> float:
    """Share of tokens in batches [batches, pairs, 3] that are padded to their longest sequence."""
    sequences = lengths[..., :1] + lengths[..., 1:]
    batches = sequences.reshape(len(sequences), -1)
    return float(batches.sum() / (batches.max(axis=1) * batches.shape[1]).sum())


# All runs


def compare(options: argparse.Namespace, directory: Path) -> tuple[list[rounds.Record], dict[str, str]]:
    """All contenders in turn, ``--rounds`` times. Returns the runs, and why a contender did not run."""
    shape, data = shape_of(options), options.pair_data
    stored = "bfloat16" if options.dtype == "bf16" else "float32"
    if options.model:
        (directory / "model").symlink_to(options.model.resolve())
    else:
        models.make_model(shape, directory / "model", None if options.lengths else data, dtype=stored)
    if options.lengths:
        count = options.pairs_per_step * options.steps
        data = models.make_pairs(models.Lengths(*options.lengths), count, shape.vocab, directory / "pairs.jsonl")
    job = {
        name: getattr(options, name)
        for name in ("steps", "warm_up", "pairs_per_step", "dtype", "pack", "max_prompt_length", "trl_batch")
    }
    job["shape"] = asdict(shape)
    records: list[rounds.Record] = []
    missing: dict[str, str] = {}
    for each, contender in itertools.product(range(options.rounds), options.contenders):
        if contender in missing:
            continue
        settings = {"contender": contender, "directory": directory, "data": data, **job}
        python = options.padding_free_python if "padding-free" in contender else sys.executable
        found = rounds.run_child(settings, threads=options.threads, python=python)
        if "unavailable" in found:
            missing[contender] = found["unavailable"]
            continue
        records.append({"contender": contender, "round": each, **found})
        rounds.write_csv(options.csv, records)
        print(
            f"# round {each + 1}, {contender}: {found['pairs_per_second']:.2f} pairs/s, "
            f"{found['peak'] / MIB:.0f} MiB, fill {found['fill']:.1%}",
            flush=True,
        )
    return records, missing


def shape_of(options: argparse.Namespace) -> models.Shape:
    return models.shape_of_model(options.model) if options.model else models.shape_of(options)


def table(records: list[rounds.Record]) -> str:
    """Medians over the rounds; ours over each, within a round."""
    rows = []
    by_round = {record["round"]: record["losses"] for record in records if record["contender"] == OURS}
    for name in dict.fromkeys(record["contender"] for record in records):
        own = [record for record in records if record["contender"] == name]
        difference = max(np.abs(np.subtract(record["losses"], by_round[record["round"]])).max() for record in own)
        rows.append(
            [
                name,
                f"{rounds.median(records, 'pairs_per_second', name):.2f}",
                f"{rounds.median(records, 'tokens_per_second', name):.0f}",
                rounds.spread(rounds.ratios(records, "pairs_per_second", OURS, name)),
                rounds.spread(rounds.ratios(records, "pairs_per_processor_second", OURS, name)),
                f"{own[0]['fill']:.1%}",
                f"{rounds.median(records, 'mfu', name):.1%}" if "mfu" in own[0] else "",
                f"{rounds.median(records, 'peak', name) / MIB:.0f}",
                f"{rounds.median(records, 'reference_seconds', name):.1f}",
                f"{difference:.1e}",
            ]
        )
    title = ["", "pairs/s", "tokens/s", "ours is x", "by processor time", "fill", "MFU", "peak, MiB"]
    return rounds.markdown([*title, "before the steps, s", "largest difference of a loss"], rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair-data", type=Path, default=EXAMPLE, help="pairs of strings, JSONL(.gz)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        metavar=("PROMPT", "RESPONSE"),
        help="made-up pairs of so many tokens on average, instead of --pair-data",
    )
    parser.add_argument("--model", type=Path, help="a Llama-shaped Hugging Face model with its tokenizer, a directory")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--trl-batch", type=int, help="pairs that TRL takes at a time (default: the whole step)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--pack", type=int, default=4096, help="greatest length of our packs")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens; of longer prompts the end is kept")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    models.add_shape_flags(parser)
    rounds.add_flags(parser, rounds=3)
    all_contenders = CONTENDERS | (LIGER if torch.cuda.is_available() else {})
    parser.add_argument("--contenders", nargs="+", choices=tuple(all_contenders), default=list(all_contenders))
    parser.add_argument(
        "--padding-free-python",
        default=sys.executable,
        help="the Python of an environment whose TRL has padding_free, where this one's has not",
    )
    options = parser.parse_args()
    options.contenders = [OURS, *(name for name in options.contenders if name != OURS)]  # whose pairs the others take
    return options


def main() -> None:
    if rounds.answer_as_child(measure):
        return
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        records, missing = compare(options, Path(directory))
    prompt, response = options.lengths or (0, 0)
    made_up = f"prompts of {prompt} and answers of {response} tokens"
    pairs = made_up if options.lengths else options.pair_data.name
    print(
        f"\n{options.model or 'random weights'}: {shape_of(options)}, {options.dtype}; {pairs}, "
        f"{options.pairs_per_step} pairs a step, {options.steps} steps of which "
        f"{options.steps - options.warm_up} timed, {options.rounds} round(s);\n"
        f"{rounds.machine(options.threads, *PACKAGES)}\n"
    )
    print(table(records))
    for name, reason in missing.items():
        print(f"\n{name}: did not run. {reason}.")


PACKAGES = ("megatron-core", "trl", "transformers")

if __name__ == "__main__":
    main()
