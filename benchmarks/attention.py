r"""Attention alone, forward and backward: a pack's plan beside the ways to attend without one.

    python benchmarks/attention.py --csv attention.csv                              # a GPU: about 8192 positions
    python benchmarks/attention.py --pairs 4 --prompt 64 --response 64 --repeats 1  # a CPU

The same pairs, in bf16 on a GPU (fp32 on a CPU), with the heads of a layer:

- shared: prompts once, both answers attend to them; the plan gathers each prompt's keys for each answer;
- repeated: a pack of whole sequences, each prompt twice; the plan is what packing is without sharing;
- dense packing: the same pack in one varlen call whose keys are the queries' own, with nothing gathered: the best that
  a trainer without shared prompts can do;
- padded: scaled_dot_product_attention of [2 x pairs, longest], causal.

Times are of whatever each needs for the same pairs, so a ratio is what a layer's attention gains.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import rounds


@dataclass(frozen=True)
class Heads:
    """Of one rank."""

    query: int
    groups: int
    size: int

    def inputs(self, positions: int, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Query, key and value of a pack: [T, heads, d] each."""
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(positions, heads, self.size, device=device, dtype=dtype, generator=generator).requires_grad_()
            for heads in (self.query, self.groups, self.groups)
        ]


def groups_of(options: argparse.Namespace) -> list[Any]:
    """Pairs with lengths from half to one and a half of the mean."""
    from megatron_bdpo.data.packs import Group

    rng = np.random.default_rng(0)

    def part(mean: int) -> Any:
        return np.ones(max(1, int(mean * rng.uniform(0.5, 1.5))), np.int32)

    return [Group(part(options.prompt), [part(options.response), part(options.response)]) for _ in range(options.pairs)]


def along_plan(groups: list[Any], share: bool, heads: Heads, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """What ``model.attention`` does in a layer."""
    from megatron_bdpo.data.packs import group_tokens, lay_out
    from megatron_bdpo.model.attention_backends import BACKENDS, default_backend
    from megatron_bdpo.model.attention_layer import Layer
    from megatron_bdpo.training.batches import to_batch

    lengths = np.array([[len(g.prompt), *map(len, g.answers)] for g in groups])
    positions = int(group_tokens(lengths, share_prompts=share).sum())
    pack = lay_out(groups, positions, share_prompts=share)
    batch = to_batch(pack, positions, positions)
    plan = (batch.to_device() if device == "cuda" else batch).attention
    query, key, value = heads.inputs(positions, device, dtype)
    layer = Layer(heads.size, heads.size**-0.5)
    attend = BACKENDS[default_backend(device == "cuda", dtype, layer)]

    def step() -> None:
        keys, values = (each.index_select(0, plan.key_index) for each in (key, value))
        gradients(attend(query, keys, values, plan, layer), query, key, value)

    return step


def dense_packing(groups: list[Any], heads: Heads, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """One varlen call over whole sequences."""
    from megatron_bdpo.model.attention_layer import Layer
    from megatron_bdpo.model.varlen import installed

    lengths = [len(g.prompt) + len(answer) for g in groups for answer in g.answers]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    query, key, value = heads.inputs(sum(lengths), device, dtype)
    attend, longest = installed(), max(lengths)
    assert attend is not None

    def step() -> None:
        out = attend(query, key, value, (starts, starts), (longest, longest), Layer(heads.size, heads.size**-0.5))
        gradients(out, query, key, value)

    return step


def padded(groups: list[Any], heads: Heads, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Every sequence as long as the longest."""
    lengths = [len(g.prompt) + len(answer) for g in groups for answer in g.answers]
    flat = heads.inputs(len(lengths) * max(lengths), device, dtype)
    query, key, value = (each.unflatten(0, (len(lengths), -1)).transpose(1, 2) for each in flat)

    def step() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads.query != heads.groups
        )
        gradients(out, *flat)

    return step


def gradients(out: Tensor, *inputs: Tensor) -> None:
    """Backward, with nothing added up from pass to pass."""
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def milliseconds(step: Callable[[], None], repeats: int) -> float:
    """The median of some passes after two."""

    def once() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)

    return statistics.median([once() for _ in range(2 + repeats)][2:])


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, groups = Heads(options.heads, options.groups, options.head_size), groups_of(options)
    steps = {
        "shared": along_plan(groups, True, heads, device, dtype),
        "repeated": along_plan(groups, False, heads, device, dtype),
        "padded": padded(groups, heads, device, dtype),
    }
    if device == "cuda":
        steps["dense packing"] = dense_packing(groups, heads, device, dtype)
    records: list[rounds.Record] = []
    for each in range(options.rounds):
        for name, step in steps.items():
            records.append({"contender": name, "round": each, "milliseconds": milliseconds(step, options.repeats)})
    rounds.write_csv(options.csv, records)
    rows = [
        [
            name,
            f"{rounds.median(records, 'milliseconds', name):.2f}",
            rounds.spread(rounds.ratios(records, "milliseconds", name, "shared")),
        ]
        for name in steps
    ]
    print(
        f"\n{options.pairs} pairs, prompts of {options.prompt} and answers of {options.response} tokens on average; "
        f"{options.heads} heads of {options.head_size}, {options.groups} for keys and values, {dtype};\n"
        f"{rounds.machine(options.threads)}\n\n"
        + rounds.markdown(["attention", "ms, forward and backward", "x shared"], rows)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=400, help="tokens, on average")
    parser.add_argument("--response", type=int, default=200, help="tokens, on average")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="key/value heads")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10, help="passes, of which the median is taken")
    rounds.add_flags(parser, rounds=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
