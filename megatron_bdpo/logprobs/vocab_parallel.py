"""Log-probs of scored positions with the vocabulary split over tensor-parallel ranks: the plain path.

It makes the logits of the scored positions, [N, V/tp] in fp32, and hands them to Megatron's vocabulary-parallel cross
entropy. Prompts and padding never get logits.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from megatron_bdpo.logprobs.logit_shape import LogitShape
from megatron_bdpo.logprobs.scored import ScoredPositions, TokenScores, megatron_parallel, select_scored

_AS_THEY_ARE = LogitShape()


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
    entropy: bool = False,
    collision_entropy: bool = False,
    shape: LogitShape = _AS_THEY_ARE,
) -> TokenScores:
    """log pi(target | prefix) of every scored position, in nats, and on request entropies of the distribution.

    Collectives over ``tp_group``: with sequence parallelism one all-gather forward and one reduce-scatter backward of
    the hidden states, otherwise one all-reduce of their gradient; three all-reduces of [N] in the cross entropy
    (maximum, target, sum of exponentials), and two more for entropies. Peak memory: two fp32 tensors [N, V/tp], two
    more while those are computed.

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        weight: [V/tp, H] rows of the output layer on this rank; ``bias`` [V/tp] or None.
        vocab_size: entries of the tokenizer. Rows beyond it are padding that depends on the layout: they take no part.
        tp_group: process group of the vocabulary split.
        gradient_accumulation_fusion: add the weight's gradient into its ``main_grad``, as Megatron's own layers do. It
            needs Apex; without, the gradient goes the way of all others, to the same ``main_grad`` in the end.
        entropy, collision_entropy: compute them, too; they carry no gradient.
        shape: scale and cap of the logits; a cap keeps one more [N, V/tp].

    Returns:
        Log-probs and entropies.
    """
    parallel = megatron_parallel()
    logits = parallel.linear_with_grad_accumulation_and_async_allreduce(
        select_scored(hidden_states, scored, tp_group=tp_group, sequence_parallel=sequence_parallel),
        weight,
        bias,
        gradient_accumulation_fusion=gradient_accumulation_fusion and apex_accumulates(),
        allreduce_dgrad=tp_group.size() > 1 and not sequence_parallel,
        sequence_parallel=False,
        tp_group=tp_group,
    )
    logits = without_padding(shape(logits.float()), vocab_size, first_row=tp_group.rank() * weight.shape[0])
    entropies: tuple[Tensor | None, Tensor | None] = (None, None)
    if entropy or collision_entropy:
        found = _entropies(logits, tp_group)  # before the cross entropy overwrites the logits
        entropies = found[0] if entropy else None, found[1] if collision_entropy else None
    return TokenScores(-parallel.vocab_parallel_cross_entropy(logits, scored.target, tp_group=tp_group), *entropies)


@functools.cache
def apex_accumulates() -> bool:
    """Whether Apex's extension is there, with which Megatron's own linear layers add gradients to ``main_grad``."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@torch.no_grad()
def _entropies(logits: Tensor, tp_group: Any) -> tuple[Tensor, Tensor]:
    """[N, V/tp] -> [N] each, with e = exp(logit - max).

    -sum_v p_v log p_v = log sum_v e_v - sum_v e_v log e_v / sum_v e_v
    -log sum_v p_v^2   = 2 log sum_v e_v - log sum_v e_v^2
    """
    maximum = logits.amax(-1)
    torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=tp_group)
    exponentials = (logits - maximum[:, None]).exp_()
    moments = torch.special.xlogy(exponentials, exponentials).sum(-1)
    sums = torch.stack([exponentials.sum(-1), moments, exponentials.square_().sum(-1)])
    torch.distributed.all_reduce(sums, group=tp_group)
    total, moment, square = sums
    return total.log() - moment / total, 2 * total.log() - square.log()


def without_padding(logits: Tensor, vocab_size: int, first_row: int) -> Tensor:
    """Give the vocabulary's padding rows probability zero."""
    real = max(0, min(vocab_size - first_row, logits.shape[-1]))
    if real == logits.shape[-1]:
        return logits
    padding = torch.arange(logits.shape[-1], device=logits.device) >= real
    return logits.masked_fill(padding, float("-inf"))
