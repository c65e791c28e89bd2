"""Time and peak memory of log-probs of scored positions, forward and backward: ours beside what others do.

    python benchmarks/logprobs.py --positions 4096 --hidden 1024 --vocab 131072 --repeats 3 --csv logprobs.csv

Every run of every variant is a process of its own, on the same random inputs; the variants take turns, so that a
machine that slows down slows all of them. What is compared is the ratio to the plain path, round by round.

- Time: one forward and backward, wall clock, after a small warm-up that loads the libraries; on a GPU the median of
  five. On a CPU the processor time of the process is measured beside it: it hardly depends on who else is busy.
- Memory: the largest amount in use during that pass, above what was in use before it: the inputs, and ``main_grad``
  where there is one. On a CPU that is the resident set's high-water mark, reset before the pass (Linux only); on a GPU
  what PyTorch had allocated. "beside gradients" leaves out the gradients that the pass returns, which every variant has
  to make.

The variants that return the same gradients are checked against each other.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.common.gauges import MIB, PeakMemory
from benchmarks.common.rounds import processor_name

Run = Callable[[], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Inputs:
    """N scored positions that are all the hidden states there are; the loss is the sum of their log-probs."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N]

    @classmethod
    def random(cls, positions: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        states = torch.randn(positions, hidden, generator=generator, device=device, dtype=dtype)
        weight = torch.randn(vocab, hidden, generator=generator, device=device, dtype=dtype).mul_(hidden**-0.5)
        target = torch.randint(0, vocab, (positions,), generator=generator, device=device)
        return cls(states.requires_grad_(), weight.requires_grad_(), target)


# Variants: each takes the inputs and returns the sum of log-probs, with its graph


def ours(
    kernel: str, options: argparse.Namespace, inputs: Inputs, *, fusion: bool = False, kept_bytes: int | None = None
) -> Tensor:
    """``megatron_bdpo.logprobs`` on one rank."""
    from megatron_bdpo.logprobs import ScoredPositions, TokenScoring

    n, nothing = len(inputs.target), torch.zeros(0, dtype=torch.int64)
    index = torch.arange(n, device=inputs.target.device)
    chunk_size = options.chunk_size if kernel == "fused" else None
    scoring = TokenScoring(len(inputs.weight), kernel, chunk_size, kept_bytes=kept_bytes)
    return scoring(
        inputs.hidden[:, None],
        inputs.weight,
        None,
        ScoredPositions(index, inputs.target, nothing, nothing, longest=0),
        tp_group=torch.distributed.group.WORLD,
        sequence_parallel=False,
        gradient_accumulation_fusion=fusion,
    ).log_probs.sum()


def fused(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """Ours; the weight's gradient is returned."""
    return ours("fused", options, inputs)


def fused_main_grad(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """Ours; the weight's gradient is added to its ``main_grad``, as in training with gradient-accumulation fusion."""
    return ours("fused", options, inputs, fusion=True)


def plain(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """Logits of the scored positions, then Megatron's vocabulary-parallel cross entropy."""
    return ours("plain", options, inputs)


def liger(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """Liger-Kernel's log-probs in chunks of positions and vocabulary: what its GRPO loss is made on."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction.apply(inputs.hidden, inputs.weight, inputs.target, None, 1.0, 4096).sum()


def trl(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """TRL's DPO without Liger: all logits, then ``selective_log_softmax``, one after the other of 8 sequences."""
    from trl.trainer.utils import selective_log_softmax

    batch = (8, -1) if len(inputs.target) % 8 == 0 else (1, -1)
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight).unflatten(0, batch)
    return selective_log_softmax(logits, inputs.target.unflatten(0, batch)).sum()


def bare(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """The three matrix products and nothing else: what no kernel that makes the logits once can be faster than."""
    with torch.no_grad():
        logits = inputs.hidden @ inputs.weight.t()
        inputs.hidden.grad, inputs.weight.grad = logits @ inputs.weight, logits.t() @ inputs.hidden
    return torch.zeros(())


def made_again(options: argparse.Namespace, inputs: Inputs) -> Tensor:
    """Ours with nothing kept of the softmax: the logits are made a second time."""
    return ours("fused", options, inputs, fusion=True, kept_bytes=0)


BASELINE = "plain"
VARIANTS: dict[str, Callable[[argparse.Namespace, Inputs], Tensor]] = {
    "plain": plain,
    "fused": fused,
    "fused, main_grad": fused_main_grad,
    "fused, main_grad, made again": made_again,
    "trl": trl,
    "liger": liger,
    "bare products": bare,
}
PACKAGES = {"trl": "trl", "liger": "liger-kernel"}


# One run, in a process of its own


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one variant once. Called in the child process."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        torch.distributed.init_process_group(
            "nccl" if options.device == "cuda" else "gloo",
            init_method=f"file://{directory}/store",
            rank=0,
            world_size=1,
        )
        try:
            warm_up = Inputs.random(64, options.hidden, 1024, DTYPES[options.dtype], options.device)
            measured_pass(options, warm_up)
            if options.device != "cuda":
                return measured_pass(options, inputs_of(options))
            inputs = inputs_of(options)
            passes = [measured_pass(options, inputs) for _ in range(7)][2:]  # kernels are chosen by shape
            return sorted(passes, key=lambda each: each["seconds"])[len(passes) // 2]
        finally:
            torch.distributed.destroy_process_group()


def inputs_of(options: argparse.Namespace) -> Inputs:
    return Inputs.random(options.positions, options.hidden, options.vocab, DTYPES[options.dtype], options.device)


def measured_pass(options: argparse.Namespace, inputs: Inputs) -> dict[str, float]:
    """Forward and backward over ``inputs``, with what it took."""
    variant = VARIANTS[options.variant]
    hidden: Any = inputs.hidden
    weight: Any = inputs.weight  # to Megatron's DDP a parameter has attributes more than PyTorch's tensors have
    returned = [hidden, weight]
    accumulates = variant in (fused_main_grad, made_again)
    hidden.grad = weight.grad = None
    if accumulates:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False  # as Megatron's DDP marks it: it wants a stand-in
        returned = [hidden]
    memory = PeakMemory(options.device)
    started, processor = time.perf_counter(), time.process_time()
    total = variant(options, inputs)
    if total.requires_grad:
        total.backward()
    peak = memory.read()  # synchronises
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    gradients = sum(tensor.grad.numel() * tensor.grad.element_size() for tensor in returned)
    weight_gradient = weight.main_grad if accumulates else weight.grad
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "peak": peak,
        "peak_beside_gradients": peak - gradients,
        "total": total.item(),
        "hidden_norm": hidden.grad.float().norm().item(),
        "weight_norm": weight_gradient.float().norm().item(),
    }


# All runs


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all variants in turn, ``--repeats`` times; one record per run."""
    records = []
    for repeat in range(options.repeats):
        for name in options.variants:
            record = {"variant": name, "repeat": repeat, **child(options, name)}
            records.append(record)
            print(f"# {name}, run {repeat + 1}: {record['seconds']:.2f} s, {record['peak'] / MIB:.0f} MiB", flush=True)
    check(records)
    return records


def child(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Measure in a fresh process."""
    flags = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in SHAPE if getattr(options, key) is not None]
    command = [sys.executable, __file__, *flags, f"--variant={name}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def check(records: list[dict[str, Any]]) -> None:
    """All runs have computed the same, but for the bare products."""
    for key in ("total", "hidden_norm", "weight_norm"):
        values = [record[key] for record in records if VARIANTS[record["variant"]] is not bare]
        if max(values) - min(values) > 1e-2 * abs(statistics.median(values)):
            raise SystemExit(f"the variants disagree: {key} from {min(values)} to {max(values)}")


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: medians, and medians of the ratios to the baseline in the same round."""
    rounds = {(record["variant"], record["repeat"]): record for record in records}
    lines = [
        "| variant | seconds | x | processor seconds | x | peak, MiB | x | beside gradients, MiB | x |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == name]
        cells = []
        for key, unit, digits in (
            ("seconds", 1, 3),
            ("processor_seconds", 1, 2),
            ("peak", MIB, 0),
            ("peak_beside_gradients", MIB, 0),
        ):
            ratios = [record[key] / rounds[BASELINE, record["repeat"]][key] for record in own]
            cells += [
                f"{statistics.median(record[key] for record in own) / unit:.{digits}f}",
                f"{statistics.median(ratios):.2f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(options: argparse.Namespace) -> str:
    """Shapes, machine, versions and date, for the head of the table."""
    device = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{processor_name()}, {options.threads} threads"
    )
    packages = ["torch", "megatron-core", *(PACKAGES[name] for name in options.variants if name in PACKAGES)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{options.positions} positions, hidden {options.hidden}, vocabulary {options.vocab}, {options.dtype}, "
        f"forward and backward, {options.repeats} runs; {device}; Python {platform.python_version()}, {versions}; "
        f"{datetime.date.today()}"
    )


SHAPE = ("positions", "hidden", "vocab", "dtype", "device", "threads", "chunk_size")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=4096, help="scored positions, N")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, H")
    parser.add_argument("--vocab", type=int, default=131072, help="vocabulary on one rank, V")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    parser.add_argument("--chunk-size", type=int, help="vocabulary rows in a chunk of ours (default: its own choice)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=available())
    parser.add_argument("--csv", type=Path, help="write one line per run here")
    parser.add_argument("--variant", choices=tuple(VARIANTS), help=argparse.SUPPRESS)  # what a child measures
    options = parser.parse_args()
    if BASELINE not in options.variants:
        options.variants.insert(0, BASELINE)
    return options


def available() -> list[str]:
    """The variants whose packages are installed; the others are named, so that no one wonders."""
    missing = [name for name, package in PACKAGES.items() if not installed(package)]
    if missing:
        print(f"# left out, not installed: {', '.join(PACKAGES[name] for name in missing)}", file=sys.stderr)
    return [name for name in VARIANTS if name not in missing]


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    options = parse()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    records = compare(options)
    print(f"\n{describe(options)}\n\n{table(records)}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]))
            writer.writeheader()
            writer.writerows(records)


if __name__ == "__main__":
    main()
