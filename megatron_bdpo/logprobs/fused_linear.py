"""Log-probs of scored positions that never see the logits: output layer and log-softmax in one, chunk by chunk.

    z_nv        = h_n . w_v + b_v                       logit of vocabulary row v at scored position n
    lse_n       = log sum_v exp z_nv                    over the tokenizer's rows; padding rows take no part
    log pi(y_n) = z_n,y_n - lse_n
    entropy_n   = lse_n - sum_v exp(z_nv - lse_n) z_nv
    collision entropy_n = 2 lse_n - log sum_v exp 2 z_nv
    d log pi(y_n) / d z_nv = [v = y_n] - exp(z_nv - lse_n)

A chunk is some rows of the vocabulary, for all positions: its maximum m and its sums are combined with those of the
other chunks (the online softmax), and then of the other ranks. Chunks are of rows rather than of positions because a
row's gradient is then complete after one matrix product: what is added up is the hidden gradient, the smaller one.

Backward needs the softmax once more. Forward keeps exp(z - m) of all chunks, in the inputs' type: that is as exact as a
softmax in this type, whatever the logits' size. Backward is then two matrix products. Where it is more than
``kept_bytes``, only lse_n is kept, and backward makes each chunk's logits a second time: three products.

Where logits are scaled and capped (``logit_shape``), z is what becomes of the product, and the gradient of the product
is that of z times the slope there. z is made again from what is kept: z = m + log exp(z - m).

Shapes: N scored positions, V padded vocabulary, c of its rows in a chunk, H hidden, tp ranks of the vocabulary split.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bdpo.logprobs.logit_shape import LogitShape
from megatron_bdpo.logprobs.scored import OneRank, ScoredPositions, TokenScores, select_scored
from megatron_bdpo.logprobs.softmax_passes import ChunkSums, Targets, passes_for

#: Bound on one chunk's fp32 logits, [N, c]: small beside a model, and at N = 16k still 1024 rows to a matrix product.
CHUNK_BYTES = 64 * 2**20

#: Matrix products are slow where rows do not begin at multiples of 16 bytes, and fastest on whole tiles.
_ROW_MULTIPLE = 128

#: Bound on what is kept of the softmax, [N, V/tp]: 8192 positions of a vocabulary of 152k fit in half precision.
KEPT_BYTES = 5 * 2**29


def default_chunk_size(positions: int) -> int:
    """Vocabulary rows whose fp32 logits at ``positions`` positions fill ``CHUNK_BYTES``, whole tiles; one at least."""
    return max(1, CHUNK_BYTES // (4 * max(1, positions)) // _ROW_MULTIPLE) * _ROW_MULTIPLE


_ALONE = OneRank()
_AS_THEY_ARE = LogitShape()


def token_log_probs(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scored: ScoredPositions,
    *,
    vocab_size: int | None = None,
    tp_group: Any = _ALONE,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    entropy: bool = False,
    collision_entropy: bool = False,
    chunk_size: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    shape: LogitShape = _AS_THEY_ARE,
) -> TokenScores:
    """log pi(target | prefix) of every scored position, in nats, and on request entropies of the distribution.

    Collectives over ``tp_group``, whatever the number of chunks. Forward: two all-reduces, of [N] (maximum) and of
    [2, N] (sum of exponentials, target's logit; a row more for each entropy). Backward: one all-reduce of [N, H], the
    hidden gradient. Under sequence parallelism an all-gather of the hidden states comes first and a reduce-scatter of
    their gradient takes the place of that all-reduce.

    Memory: kept for backward are [N, H] selected hidden states, a few [N], and the softmax [N, V/tp] in their type, if
    it is no more than ``kept_bytes``; the gathered hidden states are not. Beside them one chunk's logits [N, c] in fp32
    (twice that with the entropy on a CPU; where they are made again in half precision, half as much again in backward),
    and in backward the gradients: of the hidden states [N, H] in fp32, and of the weight, unless there is a
    ``main_grad`` to add it to; Megatron's data parallelism then gets a stand-in of that size, one for all calls.

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        weight: [V/tp, H] rows of the output layer on this rank; ``bias`` [V/tp] or None.
        vocab_size: entries of the tokenizer. Rows beyond it are padding that depends on the layout: they take no part.
            None: there is no padding.
        tp_group: process group of the vocabulary split; by default this process holds all of it. Of one rank, it is
            asked for ``rank()`` and ``size()`` only, and torch.distributed need not be initialised.
        gradient_accumulation_fusion: add the weight's gradient into its ``main_grad``, as Megatron's own layers do.
        entropy, collision_entropy: compute them, too; they carry no gradient.
        chunk_size: c, in vocabulary rows; from ``default_chunk_size`` when None.
        kept_bytes: largest softmax to keep for backward; 0 keeps none.
        shape: scale and cap of the logits. With a cap there is one more [N, c] in fp32 in backward.

    Returns:
        Log-probs and entropies.
    """
    rows = weight.shape[0]
    first_row = tp_group.rank() * rows
    shard = _Shard(
        first_row=first_row,
        real_rows=rows if vocab_size is None else max(0, min(vocab_size - first_row, rows)),
        chunk_size=default_chunk_size(scored.target.numel()) if chunk_size is None else chunk_size,
        tp_group=tp_group,
        reduce_hidden=tp_group.size() > 1 and not sequence_parallel,
        main_grad=getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None,
        entropy=entropy,
        collision_entropy=collision_entropy,
        shape=shape,
    )
    selected = select_scored(hidden_states, scored, tp_group=tp_group, sequence_parallel=sequence_parallel)
    # Inside a Function nobody can tell whether there will be a backward pass.
    has_backward = torch.is_grad_enabled() and (selected.requires_grad or weight.requires_grad)
    keeps = has_backward and selected.shape[0] * shard.real_rows * selected.element_size() <= kept_bytes
    return TokenScores(*_FusedLogProbs.apply(selected, weight, bias, scored.target.contiguous(), shard, keeps))


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary, and how to work on it."""

    first_row: int
    real_rows: int  # the rest of the V/tp rows is padding, which no chunk touches
    chunk_size: int
    tp_group: Any
    reduce_hidden: bool
    main_grad: Tensor | None
    entropy: bool
    collision_entropy: bool
    shape: LogitShape

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.real_rows, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, self.real_rows))

    def buffer(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, c] for one chunk after the other; fresh pages for each cost a CPU 6% more time."""
        return hidden.new_empty(len(hidden), _aligned(min(self.chunk_size, self.real_rows)), dtype=dtype)

    def sums(self, rows: Tensor) -> ChunkSums:
        """What is asked for, each in one of 4 rows."""
        maximum, total, moment, square = rows
        return ChunkSums(maximum, total, moment if self.entropy else None, square if self.collision_entropy else None)

    def targets(self, rows: slice, target: Tensor) -> Targets:
        return Targets(target, self.first_row + rows.start)


def _aligned(columns: int) -> int:
    """At least as many, so that every row of a matrix begins at a multiple of 16 bytes."""
    return -(-columns // 8) * 8


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shard: _Shard, keeps: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[N, H], [V/tp, H], [V/tp], [N] -> [N] log-probs, [N] entropies or None."""
        passes, buffer = passes_for(hidden.device), shard.buffer(hidden, torch.float32)
        kept = hidden.new_empty(len(hidden), _aligned(shard.real_rows)) if keeps else None
        chunks = list(shard.chunks())
        every = shard.sums(hidden.new_empty((4, len(chunks), len(hidden)), dtype=torch.float32))
        target_logit = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for index, rows in enumerate(chunks):
            sums = every.each(operator.itemgetter(index))
            own = None if kept is None else kept[:, rows]
            logits = _logits(hidden, weight, bias, rows, buffer, shard.shape)
            passes.exponentials(logits, shard.targets(rows, target), sums, target_logit, own)
        sums, target_logit = _over_ranks(_over_chunks(every), target_logit, shard)
        log_total = sums.total.log()
        log_sum_exp = sums.maximum + log_total
        entropy = None if sums.moment is None else log_total - sums.moment / sums.total
        collision_entropy = None if sums.square is None else 2 * log_total - sums.square.log()
        log_probs = target_logit - log_sum_exp
        ctx.shard = shard
        softmax = [] if kept is None else [kept, every.maximum]
        ctx.save_for_backward(hidden, weight, bias, target, log_probs, log_sum_exp, *softmax)
        ctx.mark_non_differentiable(*(each for each in (entropy, collision_entropy) if each is not None))
        return log_probs, entropy, collision_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """[N] gradient of the log-probs -> gradients of hidden states, weight and bias, where they are wanted."""
        shard: _Shard = ctx.shard
        hidden, weight, bias = ctx.saved_tensors[:3]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = None
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if shard.main_grad is None else shard.main_grad
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        for rows, grad_logits in _grad_logits(ctx.saved_tensors, incoming, shard):
            if grad_bias is not None:
                grad_bias[rows] = grad_logits.sum(0)
            if grad_hidden is not None:
                _add_product(grad_hidden, grad_logits, weight[rows])
            if grad_weight is not None:
                _add_product(grad_weight[rows], grad_logits.t(), hidden)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
            if shard.reduce_hidden:
                torch.distributed.all_reduce(grad_hidden, group=shard.tp_group)
        if grad_weight is not None and grad_weight is shard.main_grad:
            grad_weight = _stand_in(weight)
        return grad_hidden, grad_weight, grad_bias, None, None, None


# Forward -------------------------------------------------------------------------------------------------------------


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, buffer: Tensor, shape: LogitShape
) -> Tensor:
    """[N, H], [V/tp, H] -> [N, c] float32 in the buffer, to be overwritten."""
    columns = weight[rows].t()
    logits = buffer[:, : columns.shape[1]]
    if hidden.dtype == torch.float32:
        torch.mm(hidden, columns, out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, columns, out_dtype=torch.float32, out=logits)  # what the tensor cores added up, unrounded
    else:
        logits.copy_(torch.mm(hidden, columns))
    return shape.in_place(logits if bias is None else logits.add_(bias[rows]))


def _over_chunks(sums: ChunkSums) -> ChunkSums:
    """Of chunks, [chunks, N] each -> of all of them, [N] each.

    A rank that has only rows of padding has no chunks: nothing, about the lowest number there is.
    """
    if not len(sums.maximum):
        nothing = sums.maximum.new_zeros(sums.maximum.shape[1])
        lowest = torch.full_like(nothing, torch.finfo(torch.float32).min)
        return sums.each(lambda _: nothing)._replace(maximum=lowest)
    maximum = sums.maximum.amax(0)
    return _about(sums, maximum).each(lambda each: each.sum(0))._replace(maximum=maximum)


def _about(sums: ChunkSums, maximum: Tensor) -> ChunkSums:
    """Sums about their own maxima -> about a greater one; the maxima stay what they are."""
    shift = sums.maximum - maximum
    scale = shift.exp()
    moment = None if sums.moment is None else (sums.moment + sums.total * shift) * scale
    square = None if sums.square is None else sums.square * scale**2
    return ChunkSums(sums.maximum, sums.total * scale, moment, square)


def _over_ranks(sums: ChunkSums, target_logit: Tensor, shard: _Shard) -> tuple[ChunkSums, Tensor]:
    """Combine what the ranks have found, and the targets' logits, [N] each. Two all-reduces."""
    if shard.tp_group.size() == 1:
        return sums, target_logit
    maximum = sums.maximum.clone()
    torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=shard.tp_group)
    _, *own = _about(sums, maximum)
    combined = torch.stack([*(each for each in own if each is not None), target_logit])
    torch.distributed.all_reduce(combined, group=shard.tp_group)
    total, *rows, target_logit = combined
    moment, square = (None if each is None else rows.pop(0) for each in own[1:])
    return ChunkSums(maximum, total, moment, square), target_logit


# Backward ------------------------------------------------------------------------------------------------------------


def _grad_logits(saved: tuple[Tensor, ...], incoming: Tensor, shard: _Shard) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the vocabulary, and for them the gradient of their products, [N, rows] in the inputs' type.

    It is incoming_n ([v = y_n] - exp(z_nv - lse_n)) times the slope of z_nv.

    At the target, 1 - exp(log pi(y_n)) is taken from the log-prob: where that is near 0, one minus a rounded softmax
    would be noise.
    """
    hidden, weight, bias, target, log_probs, log_sum_exp, *softmax = saved
    passes, shape, incoming = passes_for(hidden.device), shard.shape, (incoming * shard.shape.scale).contiguous()
    at_target = -incoming * torch.expm1(log_probs)
    if shape.cap is not None:
        at_target *= shape.slope(log_probs + log_sum_exp)
    slope = None
    if softmax:  # all rows at once, in its place: autograd refuses to come here a second time
        kept, maxima = softmax
        for index, rows in enumerate(shard.chunks()):
            own, shift, targets = kept[:, rows], maxima[index] - log_sum_exp, shard.targets(rows, target)
            if shape.cap is not None:
                # Where nothing is left of an exponential, neither is of its gradient.
                logits = (
                    own.to(torch.float32, copy=True).log_().add_(maxima[index][:, None]).clamp_(-shape.cap, shape.cap)
                )
                slope = _slope_beside_targets(logits, shape, targets)
            passes.gradient(own, shift, incoming, at_target, targets, out=own, exponentiated=True)
            if slope is not None:
                own.mul_(slope)
        torch.autograd.graph.increment_version(kept)  # which a Triton kernel does not
        if shard.real_rows:
            yield slice(0, shard.real_rows), kept[:, : shard.real_rows]
        return
    buffer = shard.buffer(hidden, torch.float32)
    rounded = buffer if hidden.dtype == torch.float32 else shard.buffer(hidden, hidden.dtype)
    for rows in shard.chunks():
        logits, targets = _logits(hidden, weight, bias, rows, buffer, shape), shard.targets(rows, target)
        grad = rounded[:, : logits.shape[1]]
        if shape.cap is not None:
            slope = _slope_beside_targets(logits, shape, targets)
        passes.gradient(logits, -log_sum_exp, incoming, at_target, targets, out=grad, exponentiated=False)
        if slope is not None:
            grad.mul_(slope)
        yield rows, grad


def _slope_beside_targets(logits: Tensor, shape: LogitShape, targets: Targets) -> Tensor:
    """[N, c], one where the target is: what stands there has its slope."""
    slope = shape.slope(logits)
    column, here = targets.columns(slope.shape[1])
    return slope.scatter_(1, column, slope.gather(1, column).masked_fill(here, 1.0))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, added up in fp32 whatever the types."""
    if not total.is_cuda and total.dtype != torch.float32:
        total += left.float() @ right.float()
    elif not total.is_cuda:
        total.addmm_(left.float(), right.float())
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _stand_in(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in ``main_grad`` already, as from Megatron's own linear layer.

    Data parallelism has to see a gradient arrive, because its hooks start the overlapped reduction; it is told by
    ``grad_added_to_main_grad`` not to add it. It does add it where ``zero_out_wgrad`` is set: a tied embedding's
    gradient comes on top of this one.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    # Detached: a tensor that someone else holds, too, autograd would copy.
    return _never_read(weight.shape, weight.dtype, weight.device).detach()


@functools.cache
def _never_read(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One for all microbatches, as Transformer Engine has it: it is as large as the weight."""
    return torch.empty(shape, dtype=dtype, device=device)
