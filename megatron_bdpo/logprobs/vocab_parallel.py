"""Log-probs of scored positions with the vocabulary split over tensor-parallel ranks: the plain path.

It makes the logits of the scored positions, [N, V/tp] in fp32, and hands them to Megatron's vocabulary-parallel cross
entropy. Prompts and padding never get logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bdpo.logprobs.scored import ScoredPositions


def token_log_probs(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scored: ScoredPositions,
    *,
    vocab_size: int,
    tp_group: Any,
    sequence_parallel: bool,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """log pi(target | prefix) of every scored position, in nats.

    Collectives over ``tp_group``: with sequence parallelism one all-gather forward and one reduce-scatter backward of
    the hidden states, otherwise one all-reduce of their gradient; three all-reduces of [N] in the cross entropy
    (maximum, target, sum of exponentials). Peak memory: two fp32 tensors [N, V/tp].

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        weight: [V/tp, H] rows of the output layer on this rank; ``bias`` [V/tp] or None.
        vocab_size: entries of the tokenizer. Rows beyond it are padding that depends on the layout: they take no part.
        tp_group: process group of the vocabulary split.
        gradient_accumulation_fusion: add the weight's gradient into its ``main_grad``, as Megatron's own layers do.

    Returns:
        [N] float32.
    """
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        linear_with_grad_accumulation_and_async_allreduce,
        vocab_parallel_cross_entropy,
    )

    tp_size = tp_group.size()
    if sequence_parallel:
        # Each rank's logits depend on all positions: the backward of this gather sums the ranks' partial gradients.
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    selected = hidden_states.squeeze(1).index_select(0, scored.hidden)
    logits = linear_with_grad_accumulation_and_async_allreduce(
        selected,
        weight,
        bias,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        allreduce_dgrad=tp_size > 1 and not sequence_parallel,
        sequence_parallel=False,
        tp_group=tp_group,
    )
    logits = _without_padding(logits.float(), vocab_size, first_row=tp_group.rank() * weight.shape[0])
    return -vocab_parallel_cross_entropy(logits, scored.target, tp_group=tp_group)


def _without_padding(logits: Tensor, vocab_size: int, first_row: int) -> Tensor:
    """Give the vocabulary's padding rows probability zero."""
    real = max(0, min(vocab_size - first_row, logits.shape[-1]))
    if real == logits.shape[-1]:
        return logits
    padding = torch.arange(logits.shape[-1], device=logits.device) >= real
    return logits.masked_fill(padding, float("-inf"))
