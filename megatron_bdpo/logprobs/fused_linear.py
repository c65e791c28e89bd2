"""Log-probs of scored positions that never see the logits: output layer and log-softmax in one, chunk by chunk.

    z_nv        = h_n . w_v + b_v                       logit of vocabulary row v at scored position n
    lse_n       = log sum_v exp z_nv                    over the tokenizer's rows; padding rows take no part
    log pi(y_n) = z_n,y_n - lse_n
    entropy_n   = lse_n - sum_v exp(z_nv - lse_n) z_nv
    d log pi(y_n) / d z_nv = [v = y_n] - exp(z_nv - lse_n)

A chunk is some rows of the vocabulary, for all positions: maximum and sums are carried from chunk to chunk (the online
softmax), as they are combined over ranks in the end. Only lse_n is kept for the backward pass, which makes each chunk's
logits a second time. Chunks are of rows rather than of positions because a row's gradient is then complete after one
matrix product: what is added up over chunks is the hidden gradient, which is the smaller one.

Shapes: N scored positions, V padded vocabulary, c of its rows in a chunk, H hidden, tp ranks of the vocabulary split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bdpo.logprobs.scored import OneRank, ScoredPositions, TokenScores, select_scored

#: Bound on one chunk's fp32 logits, [N, c]: small beside a model, and at N = 16k still 1024 rows to a matrix product.
CHUNK_BYTES = 64 * 2**20


def default_chunk_size(positions: int) -> int:
    """Vocabulary rows whose fp32 logits at ``positions`` positions fill ``CHUNK_BYTES``; at least one."""
    return max(1, CHUNK_BYTES // (4 * max(1, positions)))


_ALONE = OneRank()


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
    chunk_size: int | None = None,
) -> TokenScores:
    """log pi(target | prefix) of every scored position, in nats, and on request the entropy of the distribution.

    Collectives over ``tp_group``, whatever the number of chunks. Forward: two all-reduces, of [N] (maximum) and of
    [2, N] (sum of exponentials, target's logit; [3, N] with the entropy). Backward: one all-reduce of [N, H], the
    hidden gradient. Under sequence parallelism an all-gather of the hidden states comes first and a reduce-scatter of
    their gradient takes the place of that all-reduce.

    Memory: [N, H] selected hidden states and [N] log-sum-exps are kept for backward; the gathered hidden states are
    not. Beside them one chunk's logits [N, c] in fp32 (twice that with the entropy; half as much again in backward for
    half precision), and in backward the gradients: of the hidden states [N, H] in fp32, and of the weight, unless there
    is a ``main_grad`` to add it to.

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        weight: [V/tp, H] rows of the output layer on this rank; ``bias`` [V/tp] or None.
        vocab_size: entries of the tokenizer. Rows beyond it are padding that depends on the layout: they take no part.
            None: there is no padding.
        tp_group: process group of the vocabulary split; by default this process holds all of it. Of one rank, it is
            asked for ``rank()`` and ``size()`` only, and torch.distributed need not be initialised.
        gradient_accumulation_fusion: add the weight's gradient into its ``main_grad``, as Megatron's own layers do.
        entropy: compute it, too; it carries no gradient.
        chunk_size: c, in vocabulary rows; from ``default_chunk_size`` when None.

    Returns:
        Log-probs [N] float32, and the entropy [N] float32 or None.
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
    )
    selected = select_scored(hidden_states, scored, tp_group=tp_group, sequence_parallel=sequence_parallel)
    return TokenScores(*_FusedLogProbs.apply(selected, weight, bias, scored.target, shard))


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

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.real_rows, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, self.real_rows))

    def buffer(self, hidden: Tensor) -> Tensor:
        """[N c] float32 for the logits of one chunk after the other; fresh pages for each cost a CPU 6% more time."""
        return hidden.new_empty(len(hidden) * min(self.chunk_size, self.real_rows), dtype=torch.float32)

    def targets_in(self, rows: slice, target: Tensor) -> tuple[Tensor, Tensor]:
        """[N] column of each target among the chunk's rows, 0 where it is not there; [N] whether it is."""
        column = target - (self.first_row + rows.start)
        here = (column >= 0) & (column < rows.stop - rows.start)
        return column.where(here, 0)[:, None], here


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shard: _Shard
    ) -> tuple[Tensor, Tensor | None]:
        """[N, H], [V/tp, H], [V/tp], [N] -> [N] log-probs, [N] entropy or None."""
        n = target.numel()
        maximum = hidden.new_full((n,), torch.finfo(torch.float32).min, dtype=torch.float32)
        sums = hidden.new_zeros((3 if shard.entropy else 2, n), dtype=torch.float32)
        buffer = shard.buffer(hidden)
        for rows in shard.chunks():
            logits = _logits(hidden, weight, bias, rows, buffer)
            chunk_maximum, chunk_sums = _chunk_sums(logits, rows, target, shard)
            larger = torch.maximum(maximum, chunk_maximum)
            sums = _shifted(sums, maximum - larger) + _shifted(chunk_sums, chunk_maximum - larger)
            maximum = larger
        log_probs, log_sum_exp, entropy = _over_ranks(maximum, sums, shard)
        ctx.shard = shard
        ctx.save_for_backward(hidden, weight, bias, target, log_sum_exp)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """[N] gradient of the log-probs -> gradients of hidden states, weight and bias, where they are wanted."""
        hidden, weight, bias, target, log_sum_exp = ctx.saved_tensors
        shard: _Shard = ctx.shard
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = None
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if shard.main_grad is None else shard.main_grad
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        buffer = shard.buffer(hidden)
        for rows in shard.chunks():
            logits = _logits(hidden, weight, bias, rows, buffer)
            grad_logits = _into_grad_logits(logits, rows, log_sum_exp, target, incoming, shard)
            if grad_bias is not None:
                grad_bias[rows] = grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
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
        return grad_hidden, grad_weight, grad_bias, None, None


# Forward -------------------------------------------------------------------------------------------------------------


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, buffer: Tensor) -> Tensor:
    """[N, H], [V/tp, H] -> [N, c] float32 in the buffer, to be overwritten."""
    columns = weight[rows].t()
    n, c = len(hidden), columns.shape[1]
    logits = buffer[: n * c].view(n, c)
    if hidden.dtype == torch.float32:
        torch.mm(hidden, columns, out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, columns, out_dtype=torch.float32, out=logits)  # what the tensor cores added up, unrounded
    else:
        logits.copy_(torch.mm(hidden, columns))
    return logits if bias is None else logits.add_(bias[rows])


def _chunk_sums(logits: Tensor, rows: slice, target: Tensor, shard: _Shard) -> tuple[Tensor, Tensor]:
    """What a chunk of the vocabulary says about every position. Overwrites ``logits``.

    Returns:
        [N] maximum m, and [2 or 3, N]: sum of exp(z - m); the target's logit, 0 where it is elsewhere; and for the
        entropy the sum of exp(z - m) (z - m).
    """
    column, here = shard.targets_in(rows, target)
    target_logit = logits.gather(1, column).squeeze(1).where(here, 0)
    maximum = logits.amax(1)
    exponentials = logits.sub_(maximum[:, None]).exp_()
    sums = [exponentials.sum(1), target_logit]
    if shard.entropy:
        sums.append(torch.special.xlogy(exponentials, exponentials).sum(1))  # 0 log 0 = 0
    return maximum, torch.stack(sums)


def _shifted(sums: Tensor, shift: Tensor) -> Tensor:
    """The sums of ``_chunk_sums`` about another maximum: ``shift`` is m minus that one, [N]."""
    total, target_logit, *moment = sums
    shifted = [total * shift.exp(), target_logit]
    shifted += [(each + total * shift) * shift.exp() for each in moment]
    return torch.stack(shifted)


def _over_ranks(own_maximum: Tensor, sums: Tensor, shard: _Shard) -> tuple[Tensor, Tensor, Tensor | None]:
    """Combine what the ranks have found: log-probs, log-sum-exps and entropy (or None), [N] each. Two all-reduces."""
    maximum = own_maximum.clone()
    if shard.tp_group.size() > 1:
        torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=shard.tp_group)
        sums = _shifted(sums, own_maximum - maximum)
        torch.distributed.all_reduce(sums, group=shard.tp_group)
    total, target_logit, *moment = sums
    log_total = total.log()
    entropy = log_total - moment[0] / total if moment else None
    return target_logit - maximum - log_total, maximum + log_total, entropy


# Backward ------------------------------------------------------------------------------------------------------------


def _into_grad_logits(
    logits: Tensor, rows: slice, log_sum_exp: Tensor, target: Tensor, incoming: Tensor, shard: _Shard
) -> Tensor:
    """incoming_n ([v = y_n] - exp(z_nv - lse_n)), [N, c], in the place of the logits."""
    grad = logits.sub_(log_sum_exp[:, None]).exp_().mul_(-incoming[:, None])
    column, here = shard.targets_in(rows, target)
    return grad.scatter_add_(1, column, incoming.where(here, 0)[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, added up in fp32 whatever the types."""
    if total.dtype != torch.float32:
        product = torch.zeros_like(total, dtype=torch.float32)
        _add_product(product, left, right)
        total += product
    elif right.is_cuda and right.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _stand_in(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in ``main_grad`` already, as from Megatron's own linear layer.

    Data parallelism has to see a gradient arrive, because its hooks start the overlapped reduction; it is told by
    ``grad_added_to_main_grad`` not to add it. It does add it where ``zero_out_wgrad`` is set: a tied embedding's
    gradient comes on top of this one.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
