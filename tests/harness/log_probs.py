"""Small problems for the log-prob kernels, and their solution by a dense log-softmax in fp64."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

POSITIONS, HIDDEN = 24, 16
PADDED_VOCABULARY = 64


@dataclass(frozen=True)
class Problem:
    """Inputs as whole arrays. T positions, V padded vocabulary rows, H hidden, N scored, A answers."""

    hidden: np.ndarray  # [T, H]
    weight: np.ndarray  # [V, H]
    bias: np.ndarray | None  # [V]
    vocab_size: int
    scored_hidden: np.ndarray  # [N]
    target: np.ndarray  # [N]
    answer_tokens: np.ndarray  # [A]
    token_gradient: np.ndarray  # [N] gradient that comes in for each token log-prob
    answer_gradient: np.ndarray  # [A] and for each sum
    scale: float = 1.0  # of the logits
    cap: float | None = None

    @property
    def sequence(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.answer_tokens)), self.answer_tokens)

    def scored(self) -> Any:
        """``ScoredPositions``. S is known to be the number of lengths, N their sum."""
        from megatron_bdpo.logprobs import ScoredPositions

        index = self.scored_hidden, self.target, self.sequence, self.answer_tokens
        return ScoredPositions(*map(torch.tensor, index), longest=int(self.answer_tokens.max(initial=0)))


def problem(
    vocab_size: int, *, bias: bool = False, answer_tokens: tuple[int, ...] = (5, 1, 9, 4), **shape: Any
) -> Problem:
    """Random values of a size that makes some tokens nearly certain and others nearly impossible."""
    rng = np.random.default_rng(vocab_size)
    weight = rng.normal(size=(PADDED_VOCABULARY, HIDDEN))
    weight[vocab_size:] = 50  # rows that are only padding: where they take part, nothing is right
    n = sum(answer_tokens)
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
        answer_tokens=np.array(answer_tokens, np.int64),
        token_gradient=rng.normal(size=n),
        answer_gradient=rng.normal(size=len(answer_tokens)),
        **shape,
    )


PROBLEMS = {
    "no padding": problem(64),
    "padding in the last shard": problem(50),
    "last shard all padding": problem(40),
    "bias": problem(50, bias=True),
    "nothing scored": problem(50, answer_tokens=()),
    "scaled": problem(50, bias=True, scale=0.6),
    "capped": problem(50, bias=True, scale=1.5, cap=7.0),  # half of the products are beyond the cap, some thrice
}


def dense(p: Problem) -> dict[str, np.ndarray]:
    """The definition, on one device in fp64, without the padding rows; gradients as whole arrays."""
    inputs = {"hidden": p.hidden, "weight": p.weight, "bias": np.zeros(PADDED_VOCABULARY) if p.bias is None else p.bias}
    leaves = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in inputs.items()}
    logits = leaves["hidden"] @ leaves["weight"][: p.vocab_size].T + leaves["bias"][: p.vocab_size]
    logits = p.scale * logits
    if p.cap is not None:
        logits = p.cap * (logits / p.cap).tanh()
    distribution = logits.log_softmax(-1)[torch.tensor(p.scored_hidden)]
    tokens = distribution.gather(1, torch.tensor(p.target)[:, None]).squeeze(1)
    sequences = torch.stack([part.sum() for part in tokens.split(p.answer_tokens.tolist())] or [tokens.sum()])
    sequences = sequences[: len(p.answer_tokens)]
    ((tokens * torch.tensor(p.token_gradient)).sum() + (sequences * torch.tensor(p.answer_gradient)).sum()).backward()
    results = {"tokens": tokens, "sequences": sequences, "entropy": -(distribution.exp() * distribution).sum(-1)}
    results["collision entropy"] = -distribution.exp().square().sum(-1).log()
    results |= {f"{name} gradient": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().numpy() for name, value in results.items()}


@contextlib.contextmanager
def tensor_parallel_group(tp: int) -> Iterator[Any]:
    """This rank's group when consecutive ranks are put into groups of ``tp``. Megatron's globals stay unset."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        groups = [torch.distributed.new_group(list(range(first, first + tp))) for first in range(0, world, tp)]
        yield groups[rank // tp]
        torch.distributed.barrier()  # rank 0 serves the store, which another group may still need to connect
    finally:
        torch.distributed.destroy_process_group()


def assert_close(value: np.ndarray, expected: np.ndarray, relative: float, what: str, scale: float = 0) -> None:
    """Within ``relative`` of the largest expected element, or of ``scale`` if that is larger."""
    assert value.shape == expected.shape, what
    error = np.abs(value - expected).max(initial=0)
    assert error <= relative * max(np.abs(expected).max(initial=0), scale), f"{what}: off by {error}"
