"""Log-probs of scored positions, with the vocabulary split over ranks, against a dense log-softmax in fp64.

Megatron's ``parallel_state`` is never initialised here: the code works with the process group it is given.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.log_probs import (
    PADDED_VOCABULARY,
    POSITIONS,
    PROBLEMS,
    Problem,
    assert_close,
    dense,
    tensor_parallel_group,
)

# (ranks, tensor-parallel size, sequence parallelism); 4 ranks with size 2 are two groups side by side.
LAYOUTS = {
    "1 rank": (1, 1, False),
    "TP2": (2, 2, False),
    "TP2 SP": (2, 2, True),
    "TP4": (4, 4, False),
    "TP4 SP": (4, 4, True),
    "2 x TP2 SP": (4, 2, True),
}

# Chunks in vocabulary rows: all of a rank's 16, 32 or 64 in one, one in each, some left over. Backward reads the
# softmax that forward has kept; where it may keep nothing, it makes the logits again.
KERNELS: dict[str, dict[str, Any]] = {
    "plain": {"kernel": "plain"},
    "fused": {},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 7": {"chunk_size": 7},
    "made again": {"kept_bytes": 0},
    "made again in chunks of 7": {"kept_bytes": 0, "chunk_size": 7},
}

# fp32 inputs: products of 16 terms and a log-sum-exp, each good to a few 6e-8.
FP32 = 1e-5


def scored_on_a_rank(
    problems: list[Problem], tp: int, sequence_parallel: bool, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Any]]:
    """This rank's part of the results by kernel: its shards of the gradients, and what every rank has of the rest.

    Every tensor-parallel group has a problem of its own, in turn.
    """
    p = problems[int(os.environ["RANK"]) // tp % len(problems)]
    with tensor_parallel_group(tp) as group:
        return {name: score(p, group, sequence_parallel, kernel, dtype) for name, kernel in KERNELS.items()}


def score(p: Problem, group: Any, sequence_parallel: bool, kernel: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Value and gradients by one kernel, on one rank."""
    from megatron_bdpo.logprobs import LogitShape, TokenScoring, answer_log_probs

    rank, tp = group.rank(), group.size()
    whole = torch.tensor(p.hidden, dtype=dtype)[:, None]
    hidden = (whole.chunk(tp)[rank] if sequence_parallel else whole).clone().requires_grad_()
    weight = torch.tensor(p.weight, dtype=dtype).chunk(tp)[rank].clone().requires_grad_()
    bias = None if p.bias is None else torch.tensor(p.bias, dtype=dtype).chunk(tp)[rank].clone().requires_grad_()
    scored = p.scored()
    scoring = TokenScoring(
        p.vocab_size, **kernel, entropy=True, collision_entropy=True, shape=LogitShape(p.scale, p.cap)
    )
    found = scoring(hidden, weight, bias, scored, tp_group=group, sequence_parallel=sequence_parallel)
    tokens, entropy, collision_entropy = found
    assert not entropy.requires_grad and not collision_entropy.requires_grad
    sequences = answer_log_probs(tokens, scored)
    if len(p.answer_tokens):
        incoming = [torch.tensor(p.token_gradient, dtype=torch.float32), torch.tensor(p.answer_gradient)]
        torch.autograd.backward([tokens, sequences], incoming)
    else:
        sequences.sum().backward()
    results = {"tokens": tokens, "sequences": sequences, "entropy": entropy}
    results["collision entropy"] = collision_entropy
    results |= {"hidden gradient": hidden.grad[:, 0], "weight gradient": weight.grad}
    if bias is not None:
        results["bias gradient"] = bias.grad
    dtypes = {name: str(value.dtype) for name, value in results.items()}
    return {"dtypes": dtypes, "rank": rank} | {n: v.detach().double().numpy() for n, v in results.items()}


def assert_solved(outcomes: dict[str, dict[str, Any]], p: Problem, tp: int, sequence_parallel: bool) -> None:
    """What one rank found is its part of the dense solution, by every kernel."""
    expected = dense(p)
    for kernel, outcome in outcomes.items():
        rank, shard = outcome["rank"], PADDED_VOCABULARY // tp
        rows = slice(rank * shard, (rank + 1) * shard)
        own = slice(rank * POSITIONS // tp, (rank + 1) * POSITIONS // tp) if sequence_parallel else slice(None)
        for name in ("tokens", "sequences", "entropy", "collision entropy"):
            assert_close(outcome[name], expected[name], FP32, f"{kernel}: {name}")
        assert_close(outcome["hidden gradient"], expected["hidden gradient"][own], FP32, f"{kernel}: hidden gradient")
        assert ("bias gradient" in outcome) == (p.bias is not None)
        for name in {"weight gradient", "bias gradient"} & outcome.keys():
            whole = np.abs(expected[name]).max(initial=0)  # a shard's own gradient may be zero
            assert_close(outcome[name], expected[name][rows], FP32, f"{kernel}: {name}", scale=whole)
            assert not outcome[name][max(0, p.vocab_size - rows.start) :].any(), f"{kernel}: {name} of padding rows"


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_a_dense_log_softmax(ranks, layout, name):
    world, tp, sequence_parallel = LAYOUTS[layout]
    for outcomes in ranks(world)(scored_on_a_rank, [PROBLEMS[name]], tp, sequence_parallel):
        assert_solved(outcomes, PROBLEMS[name], tp, sequence_parallel)


def test_one_replica_has_nothing_to_score(ranks):
    """Its tensor-parallel group goes through the same collectives as one that has."""
    problems = [PROBLEMS["bias"], PROBLEMS["nothing scored"]]
    for rank, outcomes in enumerate(ranks(4)(scored_on_a_rank, problems, 2, True)):
        assert_solved(outcomes, problems[rank // 2], 2, sequence_parallel=True)


@pytest.mark.parametrize("name", ["bias", "capped"])
def test_half_precision_keeps_its_types(ranks, name):
    """Log-probs come out in fp32, sums in fp64, gradients in the type of their inputs."""
    p = PROBLEMS[name]
    rounded = {
        name: torch.tensor(getattr(p, name)).bfloat16().double().numpy() for name in ("hidden", "weight", "bias")
    }
    expected = dense(replace(p, **rounded))
    for outcomes in ranks(2)(scored_on_a_rank, [p], 2, True, torch.bfloat16):
        for kernel, outcome in outcomes.items():
            assert outcome["dtypes"] == {
                "tokens": "torch.float32",
                "sequences": "torch.float64",
                "entropy": "torch.float32",
                "collision entropy": "torch.float32",
                "hidden gradient": "torch.bfloat16",
                "weight gradient": "torch.bfloat16",
                "bias gradient": "torch.bfloat16",
            }
            # Logits reach 15 and are rounded to 8 bits, by the plain kernel again after the bias: 2 * 16 * 2^-9.
            assert np.abs(outcome["tokens"] - expected["tokens"]).max() < 0.0625 * max(1, p.scale), kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_are_left_as_they_were(ranks, kernel):
    """Kernels work in place: on their own logits, never on what they were given."""
    before, after = ranks(1)(inputs_before_and_after, KERNELS[kernel])[0]
    assert before.keys() == after.keys()
    for name, expected in before.items():
        assert np.array_equal(after[name], expected), name


def inputs_before_and_after(kernel: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    from megatron_bdpo.logprobs import TokenScoring

    p = PROBLEMS["bias"]
    scored = p.scored()
    hidden, weight, bias = (torch.tensor(array).float().requires_grad_() for array in (p.hidden, p.weight, p.bias))
    incoming = torch.tensor(p.token_gradient).float()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias, "incoming": incoming}
    inputs |= {"index": scored.hidden, "target": scored.target}

    def values() -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in inputs.items()}

    before = values()
    with tensor_parallel_group(1) as group:
        scoring = TokenScoring(p.vocab_size, **kernel, entropy=True)
        scores = scoring(hidden[:, None], weight, bias, scored, tp_group=group, sequence_parallel=False)
        scores.log_probs.backward(incoming)
    return before, values()


# Sums over sequences


def scored_with_lengths(lengths: list[int]) -> Any:
    from megatron_bdpo.logprobs import ScoredPositions

    tokens = torch.tensor(lengths, dtype=torch.int64)
    nothing = torch.zeros(int(tokens.sum()), dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), tokens)
    return ScoredPositions(nothing, nothing, sequence, tokens, longest=max(lengths, default=0))


def test_sums_are_added_in_double_precision():
    """A log-ratio of 1e-3 is the difference of two sums of size 1e4: in fp32 nothing of it would be left."""
    from megatron_bdpo.logprobs import answer_log_probs

    tokens = -10 * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    sums = answer_log_probs(tokens, scored_with_lengths([2000, 1000]))
    expected_sums = np.array([tokens[:2000].double().sum(), tokens[2000:].double().sum()])
    assert sums.dtype == torch.float64
    assert sums.numpy() == pytest.approx(expected_sums, rel=1e-14)


def test_sequence_without_tokens_sums_to_zero():
    from megatron_bdpo.logprobs import answer_log_probs

    sums = answer_log_probs(torch.tensor([-1.0, -2.0, -4.0]), scored_with_lengths([2, 0, 1]))
    assert sums.tolist() == [-3, 0, -4]


def test_pack_without_sequences_keeps_its_graph():
    """A rank that has nothing to score still runs its backward, and with it its collectives."""
    from megatron_bdpo.logprobs import answer_log_probs

    tokens = torch.zeros(0, requires_grad=True)
    sums = answer_log_probs(tokens, scored_with_lengths([]))
    assert sums.shape == (0,)
    sums.sum().backward()
    assert tokens.grad is not None
