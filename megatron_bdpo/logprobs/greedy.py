"""The likeliest next token, with the vocabulary split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from megatron_bdpo.logprobs.scored import ScoredPositions, select_scored
from megatron_bdpo.logprobs.vocab_parallel import without_padding


@torch.no_grad()
def likeliest_tokens(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: ScoredPositions,
    *,
    vocab_size: int,
    tp_group: Any,
    sequence_parallel: bool,
) -> Tensor:
    """The token that follows each position under greedy decoding; of equal logits the smallest id.

    Collectives over ``tp_group``: with sequence parallelism an all-gather of the hidden states; an all-gather of
    [2, N]. Peak memory: the logits of these positions, [N, V/tp].

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        weight: [V/tp, H] rows of the output layer on this rank; ``bias`` [V/tp] or None.
        positions: N of them; their targets are not read.
        vocab_size: entries of the tokenizer; rows beyond it are padding, and never chosen.

    Returns:
        [N] int64, the same on all ranks of ``tp_group``.
    """
    hidden = select_scored(hidden_states, positions, tp_group=tp_group, sequence_parallel=sequence_parallel)
    first_row = tp_group.rank() * weight.shape[0]
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    best, row = without_padding(logits, vocab_size, first_row).max(dim=-1)
    own = torch.stack([best.double(), (row + first_row).double()])  # ids are exact below 2^53
    if tp_group.size() == 1:
        return own[1].long()
    of_ranks = [torch.empty_like(own) for _ in range(tp_group.size())]
    distributed.all_gather(of_ranks, own, group=tp_group)
    values, tokens = torch.stack(of_ranks, dim=1)
    return tokens.gather(0, values.argmax(dim=0, keepdim=True))[0].long()
