r"""What scoring the reference costs, beside one training epoch over the same pairs, on the CPU.

    python benchmarks/scoring.py PAIRS.jsonl.gz             # 64 pairs, 8 layers of 512, about two minutes
    python benchmarks/scoring.py PAIRS.jsonl.gz --pairs 256 --layers 4

One process scores all pairs in a job of its own, then trains one epoch on them, with prompts shared by both answers and
without; all are timed from the first pack to the last, without reading data or making models. The ideal is by tokens, a
backward pass counted as two forward ones:

    scoring            P + W + L after the prompt, E + W + L after the empty one     forward
    training           P + W + L                                                     forward and backward: three times
    without sharing    2 P + W + L                                                   likewise

for prompts of P, answers of W and L and an empty prompt of E tokens. Seconds are the processor's, on one thread: what
else the machine does is not counted.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

TOKENIZER = Path(__file__).parents[1] / "examples" / "data" / "tokenizer.model"
LLAMA = (
    "--group-query-attention --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="preference pairs")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--pairs-per-step", type=int, default=16)
    options = parser.parse_args()

    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    import torch

    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.reference.cache import open_scores
    from megatron_bdpo.training.reference.scoring_job import score_pairs
    from megatron_bdpo.training.run import PreferenceRun

    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # the clock of scoring and training
    heads = max(1, options.hidden // 64)
    with tempfile.TemporaryDirectory() as cache:
        flags = [
            *f"{LLAMA} --num-layers {options.layers} --hidden-size {options.hidden}".split(),
            *f"--num-attention-heads {heads} --position-embedding-type rope".split(),
            *f"--num-query-groups {max(1, heads // 2)} --ffn-hidden-size {options.hidden * 8 // 3 // 8 * 8}".split(),
            *f"--seq-length {options.seq_length} --long-pairs drop --max-pairs {options.pairs}".split(),
            *f"--pairs-per-step {options.pairs_per_step} --pair-epochs 1 --lr 1e-5".split(),
            *["--pair-data", options.data, "--pair-cache-dir", cache],
            *["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(TOKENIZER)],
        ]
        arguments = Arguments.parse(flags)
        with distributed.process_groups(arguments.settings.process):
            (directory,) = score_pairs(arguments)
        scoring = open_scores(directory).manifest["jobs"][-1]
        parts = {"scoring": scoring}
        for name, sharing in (("one training epoch", []), ("the same, prompts not shared", ["--no-share-prompts"])):
            arguments = Arguments.parse([*flags, *sharing])
            with distributed.process_groups(arguments.settings.process):
                run = PreferenceRun(arguments)
                run.pretrain()
            parts[name] = training_of(run)
    report(parts)


def training_of(run) -> dict[str, float]:
    """Pairs, tokens and seconds of all training steps, the optimizer's part included."""
    pairs = run.job.plan.steps.shape[1]
    seconds = sum(pairs / step["throughput/pairs_per_second"] for step in run.progress.steps)
    return {"pairs": run.job.plan.steps.size, "tokens": int(run.job.plan.real_tokens.sum()), "seconds": seconds}


def report(parts: dict[str, dict]) -> None:
    print(
        f"\n| | pairs | tokens | processor seconds | pairs/s | tokens/s | scoring costs | ideally |\n|---|{'---:|' * 7}"
    )
    scoring = parts["scoring"]
    for name, part in parts.items():
        pairs, tokens, seconds = part["pairs"], part["tokens"], part["seconds"]
        rates = f"{pairs / seconds:.2f} | {tokens / seconds:,.0f}"
        cost = (scoring["seconds"] / scoring["pairs"]) / (seconds / pairs)
        ideal = (scoring["tokens"] / scoring["pairs"]) / (3 * tokens / pairs)
        relative = "|" if part is scoring else f"{cost:.2f} | {ideal:.2f}"
        print(f"| {name} | {pairs} | {tokens:,} | {seconds:.1f} | {rates} | {relative} |")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
