"""Log-probs of scored positions that never see the logits: output layer and log-softmax in one, chunk by chunk.

    z_nv        = h_n . w_v + b_v                       logit of vocabulary row v at scored position n
    lse_n       = log sum_v exp z_nv                    over the tokenizer's rows; padding rows take no part
    log pi(y_n) = z_n,y_n - lse_n
    entropy_n   = lse_n - sum_v exp(z_nv - lse_n) z_nv
    d log pi(y_n) / d z_nv = [v = y_n] - exp(z_nv - lse_n)

Only lse_n is kept for the backward pass, which makes each chunk's logits a second time.

Shapes: N scored positions, c of them in a chunk, V padded vocabulary, H hidden, tp ranks of the vocabulary split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bdpo.logprobs.scored import ScoredPositions, TokenScores, select_scored

#: Bound on one chunk's fp32 logits, [c, V/tp]: small beside a model and its activations, and at V/tp = 128k still the
#: 512 positions that a matrix product needs to be worth reading the weight for.
CHUNK_BYTES = 256 * 2**20


def default_chunk_size(vocab_rows: int) -> int:
    """Positions whose fp32 logits over ``vocab_rows`` (V/tp) rows fill ``CHUNK_BYTES``; at least one."""
    return max(1, CHUNK_BYTES // (4 * vocab_rows))


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
    chunk_size: int | None = None,
) -> TokenScores:
    """log pi(target | prefix) of every scored position, in nats, and on request the entropy of the distribution.

    Collectives over ``tp_group``, whatever the number of chunks. Forward: two all-reduces, of [N] (maximum) and of
    [2, N] (sum of exponentials, target's logit; [3, N] with the entropy). Backward: one all-reduce of [N, H], the
    hidden gradient. Under sequence parallelism an all-gather of the hidden states comes first and a reduce-scatter of
    their gradient takes the place of that all-reduce.

    Memory: [N, H] selected hidden states and [N] log-sum-exps are kept for backward; the gathered hidden states are
    not. Beside them one chunk's logits [c, V/tp] in fp32 (twice that with the entropy, half as much again in backward
    for half-precision weights), and the weight's gradient in fp32, unless there is a ``main_grad`` to add it to.

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        weight: [V/tp, H] rows of the output layer on this rank; ``bias`` [V/tp] or None.
        vocab_size: entries of the tokenizer. Rows beyond it are padding that depends on the layout: they take no part.
        tp_group: process group of the vocabulary split.
        gradient_accumulation_fusion: add the weight's gradient into its ``main_grad``, as Megatron's own layers do.
        entropy: compute it, too; it carries no gradient.
        chunk_size: c; from ``default_chunk_size`` when None.

    Returns:
        Log-probs [N] float32, and the entropy [N] float32 or None.
    """
    rows = weight.shape[0]
    first_row = tp_group.rank() * rows
    shard = _Shard(
        first_row=first_row,
        real_rows=max(0, min(vocab_size - first_row, rows)),
        chunk_size=default_chunk_size(rows) if chunk_size is None else chunk_size,
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
    real_rows: int  # the rest of the V/tp rows is padding
    chunk_size: int
    tp_group: Any
    reduce_hidden: bool
    main_grad: Tensor | None
    entropy: bool

    def chunks(self, positions: int) -> Iterator[slice]:
        for start in range(0, positions, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, positions))

    def local(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(row of each target on this rank, whether it is here); the row is 0 where it is not. [c] each."""
        row = target - self.first_row
        here = (row >= 0) & (row < self.real_rows)
        return row.where(here, 0), here


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shard: _Shard
    ) -> tuple[Tensor, Tensor | None]:
        """[N, H], [V/tp, H], [V/tp], [N] -> [N] log-probs, [N] entropy or None."""
        parts = [
            _chunk_statistics(_logits(hidden[part], weight, bias), target[part], shard)
            for part in shard.chunks(target.numel())
        ]
        statistics = torch.cat(parts, dim=1) if parts else hidden.new_zeros((4, 0), dtype=torch.float32)
        log_probs, log_sum_exp, entropy = _over_ranks(statistics, shard)
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
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = _weight_accumulator(weight, shard.main_grad) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for part in shard.chunks(target.numel()):
            grad_logits = _grad_logits(
                _logits(hidden[part], weight, bias), log_sum_exp[part], target[part], incoming[part], shard
            )
            if grad_hidden is not None:
                torch.mm(grad_logits.to(weight.dtype), weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            del grad_logits  # before the next chunk's come
        if grad_hidden is not None and shard.reduce_hidden:
            torch.distributed.all_reduce(grad_hidden, group=shard.tp_group)
        if grad_weight is not None:
            grad_weight = _hand_over(weight, grad_weight, shard.main_grad)
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), None, None


# Logits of a chunk ---------------------------------------------------------------------------------------------------


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[c, H], [V/tp, H] -> [c, V/tp] float32, padding rows included; ours to overwrite."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # what the tensor cores added up, unrounded
    else:
        logits = torch.mm(hidden, weight.t()).float()
    return logits if bias is None else logits.add_(bias)


def _chunk_statistics(logits: Tensor, target: Tensor, shard: _Shard) -> Tensor:
    """What this rank's rows say about a chunk. Overwrites ``logits``.

    Returns:
        [3 or 4, c]: maximum m, sum of exp(z - m), the target's logit (0 where it is on another rank), and for the
        entropy the sum of exp(z - m) (z - m).
    """
    row, here = shard.local(target)
    target_logit = logits.gather(1, row[:, None]).squeeze(1).where(here, 0)
    logits[:, shard.real_rows :] = float("-inf")
    maximum = logits.amax(1).clamp(min=torch.finfo(torch.float32).min)  # finite on a rank that has only padding
    exponentials = logits.sub_(maximum[:, None]).exp_()
    statistics = [maximum, exponentials.sum(1), target_logit]
    if shard.entropy:
        statistics.append(torch.special.xlogy(exponentials, exponentials).sum(1))  # 0 log 0 = 0
    return torch.stack(statistics)


def _over_ranks(statistics: Tensor, shard: _Shard) -> tuple[Tensor, Tensor, Tensor | None]:
    """Combine all ranks' statistics: log-probs, log-sum-exps and entropy (or None), [N] each. Two all-reduces."""
    own_maximum, own_total, target_logit = statistics[:3]
    maximum = own_maximum.clone()
    _all_reduce(maximum, torch.distributed.ReduceOp.MAX, shard.tp_group)
    shift = own_maximum - maximum  # <= 0
    sums = [own_total * shift.exp(), target_logit]
    if shard.entropy:
        sums.append((statistics[3] + own_total * shift) * shift.exp())
    reduced = torch.stack(sums)
    _all_reduce(reduced, torch.distributed.ReduceOp.SUM, shard.tp_group)
    log_total = reduced[0].log()
    entropy = log_total - reduced[2] / reduced[0] if shard.entropy else None
    return reduced[1] - maximum - log_total, maximum + log_total, entropy


def _all_reduce(tensor: Tensor, operation: Any, group: Any) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, op=operation, group=group)


# Gradients -----------------------------------------------------------------------------------------------------------


def _grad_logits(logits: Tensor, log_sum_exp: Tensor, target: Tensor, incoming: Tensor, shard: _Shard) -> Tensor:
    """incoming_n ([v = y_n] - exp(z_nv - lse_n)) in the place of the logits, [c, V/tp]; zero in padding rows."""
    grad = logits.sub_(log_sum_exp[:, None]).exp_().mul_(-incoming[:, None])
    grad[:, shard.real_rows :] = 0
    row, here = shard.local(target)
    grad[torch.arange(len(row), device=row.device), row] += incoming.where(here, 0)
    return grad


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total [V/tp, H] float32 += grad_logits^T hidden, added up in fp32 over positions and chunks."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        factors = grad_logits.to(hidden.dtype).t(), hidden
        torch.addmm(total, *factors, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(grad_logits.t(), hidden.float())


def _weight_accumulator(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """[V/tp, H] float32 to add chunks to: ``main_grad`` itself if it is fp32."""
    if main_grad is not None and main_grad.dtype == torch.float32:
        return main_grad
    return torch.zeros_like(weight, dtype=torch.float32)


def _hand_over(weight: Tensor, total: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """The gradient that autograd gets for the weight: as in Megatron's LinearWithGradAccumulationAndAsyncCommunication.

    With a ``main_grad`` the values are there already. Data parallelism still has to see a gradient arrive, because its
    hooks start the overlapped reduction, and is told by ``grad_added_to_main_grad`` not to add it. It does add it where
    ``zero_out_wgrad`` is set: a tied embedding's gradient comes on top of this one.
    """
    if main_grad is None:
        return total.to(weight.dtype)
    if total is not main_grad:
        main_grad.add_(total)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
