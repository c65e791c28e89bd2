"""Greedy tokens of one rank; several are in tests/hf/test_generations.py."""

from __future__ import annotations

import torch

from megatron_bdpo.logprobs import OneRank, ScoredPositions, likeliest_tokens


def likeliest(logits: torch.Tensor, *, vocab_size: int, bias: torch.Tensor | None = None) -> list[int]:
    """Of positions with these logits [N, V], the hidden states being unit vectors."""
    count = len(logits)
    positions = ScoredPositions.of(list(range(count))[::-1], [0] * count, [1] * count)
    tokens = likeliest_tokens(
        torch.eye(count)[:, None],
        logits.T.contiguous(),
        bias,
        positions,
        vocab_size=vocab_size,
        tp_group=OneRank(),
        sequence_parallel=False,
    )
    return tokens.tolist()[::-1]


LOGITS = torch.tensor([[0.0, 3.0, 1.0, 9.0], [2.0, 2.0, -1.0, 9.0], [-3.0, -2.0, -1.0, -9.0]])


def test_padding_is_never_chosen_and_the_first_of_equals_is():
    assert likeliest(LOGITS, vocab_size=3) == [1, 0, 2]
    assert likeliest(LOGITS, vocab_size=4) == [3, 3, 2]


def test_bias():
    assert likeliest(LOGITS, vocab_size=3, bias=torch.tensor([0.0, 0.0, 5.0, 0.0])) == [2, 2, 2]
