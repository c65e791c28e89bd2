"""Log-probs of scored positions, with the vocabulary split over ranks, against a dense log-softmax in fp64.

Megatron's ``parallel_state`` is never initialised here: the code works with the process group it is given.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

POSITIONS, HIDDEN = 24, 16
PADDED_VOCABULARY = 64

# (ranks, tensor-parallel size, sequence parallelism); 4 ranks with size 2 are two groups side by side.
LAYOUTS = {
    "1 rank": (1, 1, False),
    "TP2": (2, 2, False),
    "TP2 SP": (2, 2, True),
    "TP4": (4, 4, False),
    "TP4 SP": (4, 4, True),
    "2 x TP2 SP": (4, 2, True),
}

# fp32 inputs: products of 16 terms and a log-sum-exp, each good to a few 6e-8.
FP32 = 1e-5


@dataclass(frozen=True)
class Problem:
    """Inputs as whole arrays. T positions, V padded vocabulary rows, H hidden, N scored, S sequences."""

    hidden: np.ndarray  # [T, H]
    weight: np.ndarray  # [V, H]
    bias: np.ndarray | None  # [V]
    vocab_size: int
    scored_hidden: np.ndarray  # [N]
    target: np.ndarray  # [N]
    sequence_tokens: np.ndarray  # [S]
    token_gradient: np.ndarray  # [N] gradient that comes in for each token log-prob
    sequence_gradient: np.ndarray  # [S] and for each sum

    @property
    def sequence(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.sequence_tokens)), self.sequence_tokens)

    @property
    def index(self) -> tuple[np.ndarray, ...]:
        """The arrays of ``ScoredPositions``."""
        return self.scored_hidden, self.target, self.sequence, self.sequence_tokens

    @property
    def longest(self) -> int:
        return int(self.sequence_tokens.max(initial=0))


def problem(vocab_size: int, *, bias: bool = False, sequence_tokens: tuple[int, ...] = (5, 1, 9, 4)) -> Problem:
    """Random values of a size that makes some tokens nearly certain and others nearly impossible."""
    rng = np.random.default_rng(vocab_size)
    weight = rng.normal(size=(PADDED_VOCABULARY, HIDDEN))
    weight[vocab_size:] = 50  # rows that are only padding: where they take part, nothing is right
    n = sum(sequence_tokens)
    borders = [v for first in range(0, 64, 16) for v in (first, first + 15) if v < vocab_size] + [vocab_size - 1]
    target = np.concatenate([borders, rng.integers(0, vocab_size, 64)])[:n]
    scored_hidden = rng.integers(0, POSITIONS, n)
    scored_hidden[: n // 3] = scored_hidden[n // 3 : 2 * (n // 3)]  # hidden states that predict several tokens
    return Problem(
        hidden=rng.normal(size=(POSITIONS, HIDDEN)),
        weight=weight,
        bias=rng.normal(size=PADDED_VOCABULARY) if bias else None,
        vocab_size=vocab_size,
        scored_hidden=scored_hidden,
        target=target,
        sequence_tokens=np.array(sequence_tokens, np.int64),
        token_gradient=rng.normal(size=n),
        sequence_gradient=rng.normal(size=len(sequence_tokens)),
    )


PROBLEMS = {
    "no padding": problem(64),
    "padding in the last shard": problem(50),
    "last shard all padding": problem(40),
    "bias": problem(50, bias=True),
    "nothing scored": problem(50, sequence_tokens=()),
}


def dense(p: Problem) -> dict[str, np.ndarray]:
    """The definition, on one device in fp64, without the padding rows."""
    hidden, weight = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (p.hidden, p.weight))
    logits = hidden @ weight[: p.vocab_size].T
    if p.bias is not None:
        logits = logits + torch.tensor(p.bias[: p.vocab_size])
    tokens = logits.log_softmax(-1)[torch.tensor(p.scored_hidden), torch.tensor(p.target)]
    sequences = torch.stack([part.sum() for part in tokens.split(p.sequence_tokens.tolist())] or [tokens.sum()])
    sequences = sequences[: len(p.sequence_tokens)]
    ((tokens * torch.tensor(p.token_gradient)).sum() + (sequences * torch.tensor(p.sequence_gradient)).sum()).backward()
    results = {"tokens": tokens, "sequences": sequences, "hidden gradient": hidden.grad, "weight gradient": weight.grad}
    return {name: value.detach().numpy() for name, value in results.items()}


def scored_on_a_rank(
    p: Problem, tp: int, sequence_parallel: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """This rank's part of the results: its shards of the gradients, and what every rank has of the rest."""
    from megatron_bdpo.logprobs import ScoredPositions, sequence_log_probs, token_log_probs

    with tensor_parallel_group(tp) as group:
        rank = group.rank()
        whole = torch.tensor(p.hidden, dtype=dtype)[:, None]
        hidden = (whole.chunk(tp)[rank] if sequence_parallel else whole).clone().requires_grad_()
        weight = torch.tensor(p.weight, dtype=dtype).chunk(tp)[rank].clone().requires_grad_()
        bias = None if p.bias is None else torch.tensor(p.bias, dtype=dtype).chunk(tp)[rank].clone()
        scored = ScoredPositions(*map(torch.tensor, p.index), longest=p.longest)
        tokens = token_log_probs(
            hidden, weight, bias, scored,
            vocab_size=p.vocab_size, tp_group=group, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        sequences = sequence_log_probs(tokens, scored)
        if len(p.sequence_tokens):
            incoming = [torch.tensor(p.token_gradient, dtype=torch.float32), torch.tensor(p.sequence_gradient)]
            torch.autograd.backward([tokens, sequences], incoming)
        else:
            sequences.sum().backward()
        gradients = {"hidden gradient": hidden.grad[:, 0], "weight gradient": weight.grad}
        results = {"tokens": tokens, "sequences": sequences, **gradients}
        dtypes = {name: str(value.dtype) for name, value in results.items()}
        return {"dtypes": dtypes, "rank": rank} | {n: v.detach().double().numpy() for n, v in results.items()}


@contextlib.contextmanager
def tensor_parallel_group(tp: int) -> Iterator[Any]:
    """This rank's group when consecutive ranks are put into groups of ``tp``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        groups = [torch.distributed.new_group(list(range(first, first + tp))) for first in range(0, world, tp)]
        yield groups[rank // tp]
    finally:
        torch.distributed.destroy_process_group()


def assert_close(value: np.ndarray, expected: np.ndarray, relative: float, what: str) -> None:
    """Within ``relative`` of the largest expected element."""
    assert value.shape == expected.shape, what
    error = np.abs(value - expected).max(initial=0)
    assert error <= relative * np.abs(expected).max(initial=0), f"{what}: off by {error}"


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_a_dense_log_softmax(ranks, layout, name):
    world, tp, sequence_parallel = LAYOUTS[layout]
    p = PROBLEMS[name]
    expected = dense(p)
    outcomes = ranks(world)(scored_on_a_rank, p, tp, sequence_parallel)
    for outcome in outcomes:
        rows = slice(outcome["rank"] * PADDED_VOCABULARY // tp, (outcome["rank"] + 1) * PADDED_VOCABULARY // tp)
        own = slice(outcome["rank"] * POSITIONS // tp, (outcome["rank"] + 1) * POSITIONS // tp)
        assert_close(outcome["tokens"], expected["tokens"], FP32, "tokens")
        assert_close(outcome["sequences"], expected["sequences"], FP32, "sequences")
        scale = np.abs(expected["weight gradient"]).max(initial=0)
        off = np.abs(outcome["weight gradient"] - expected["weight gradient"][rows]).max()
        assert off <= FP32 * scale, "weight gradient"  # of the whole: a shard's own may be zero
        hidden = expected["hidden gradient"][own] if sequence_parallel else expected["hidden gradient"]
        assert_close(outcome["hidden gradient"], hidden, FP32, "hidden gradient")
        assert not outcome["weight gradient"][max(0, p.vocab_size - rows.start) :].any(), "padding rows"


def test_half_precision_keeps_its_types(ranks):
    """Log-probs come out in fp32, sums in fp64, gradients in the type of their inputs."""
    p = PROBLEMS["padding in the last shard"]
    rounded = {name: torch.tensor(getattr(p, name)).bfloat16().double().numpy() for name in ("hidden", "weight")}
    expected = dense(Problem(**{**vars(p), **rounded}))
    for outcome in ranks(2)(scored_on_a_rank, p, 2, True, torch.bfloat16):
        assert outcome["dtypes"] == {
            "tokens": "torch.float32",
            "sequences": "torch.float64",
            "hidden gradient": "torch.bfloat16",
            "weight gradient": "torch.bfloat16",
        }
        # Logits reach 12 and are rounded to 8 bits: 12 * 2^-9.
        assert np.abs(outcome["tokens"] - expected["tokens"]).max() < 0.05


def test_inputs_are_left_as_they_were(ranks):
    """Megatron's cross entropy works in place: on our logits, never on what we were given."""
    before, after = ranks(1)(inputs_before_and_after)[0]
    for name, expected in before.items():
        assert np.array_equal(after[name], expected), name


def inputs_before_and_after() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    from megatron_bdpo.logprobs import ScoredPositions, token_log_probs

    p = PROBLEMS["no padding"]
    hidden, weight = torch.tensor(p.hidden).float()[:, None], torch.tensor(p.weight).float()
    index = [torch.tensor(array) for array in p.index]
    inputs = dict(
        zip(("hidden", "weight", "index", "target", "sequence", "lengths"), (hidden, weight, *index), strict=True)
    )
    before = {name: value.numpy().copy() for name, value in inputs.items()}
    with tensor_parallel_group(1) as group:
        scored = ScoredPositions(*index, longest=p.longest)
        token_log_probs(hidden, weight, None, scored, vocab_size=64, tp_group=group, sequence_parallel=False)
    return before, {name: value.numpy() for name, value in inputs.items()}


# Sums over sequences


def scored_with_lengths(lengths: list[int]) -> Any:
    from megatron_bdpo.logprobs import ScoredPositions

    tokens = torch.tensor(lengths, dtype=torch.int64)
    nothing = torch.zeros(int(tokens.sum()), dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), tokens)
    return ScoredPositions(nothing, nothing, sequence, tokens, longest=max(lengths, default=0))


def test_sums_are_added_in_double_precision():
    """A log-ratio of 1e-3 is the difference of two sums of size 1e4: in fp32 nothing of it would be left."""
    from megatron_bdpo.logprobs import sequence_log_probs

    tokens = -10 * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    sums = sequence_log_probs(tokens, scored_with_lengths([2000, 1000]))
    expected_sums = np.array([tokens[:2000].double().sum(), tokens[2000:].double().sum()])
    assert sums.dtype == torch.float64
    assert sums.numpy() == pytest.approx(expected_sums, rel=1e-14)


def test_sequence_without_tokens_sums_to_zero():
    from megatron_bdpo.logprobs import sequence_log_probs

    sums = sequence_log_probs(torch.tensor([-1.0, -2.0, -4.0]), scored_with_lengths([2, 0, 1]))
    assert sums.tolist() == [-3, 0, -4]


def test_pack_without_sequences_keeps_its_graph():
    """A rank that has nothing to score still runs its backward, and with it its collectives."""
    from megatron_bdpo.logprobs import sequence_log_probs

    tokens = torch.zeros(0, requires_grad=True)
    sums = sequence_log_probs(tokens, scored_with_lengths([]))
    assert sums.shape == (0,)
    sums.sum().backward()
    assert tokens.grad is not None
