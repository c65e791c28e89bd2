"""``softmax_passes`` as Triton kernels: a chunk's logits are read from memory once forward and once backward.

A program has one position. It reads its row of the chunk twice forward, for the maximum and for the sums; the row is a
few KiB, so the second time it comes from the cache. This is the only file that imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_bdpo.logprobs.softmax_passes import ChunkSums, Targets

_BLOCK = 4096
_WARPS = 8


@triton.jit(do_not_specialize=["first"])
def _exponentials(  # type: ignore[no-untyped-def]  # pointers, and numbers that the compiler may know
    logits,
    row_stride,
    columns,
    target,
    first,
    maximum,
    total,
    moment,
    square,
    target_logit,
    kept,
    kept_stride,
    HAS_MOMENT: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row's offset may be beyond 2^31
    logits += row * row_stride
    place = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + place < columns
        highest = tl.maximum(highest, tl.load(logits + start + place, mask=inside, other=float("-inf")))
    m = tl.max(highest, axis=0)
    sums = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + place < columns
        z = tl.load(logits + start + place, mask=inside, other=float("-inf")) - m
        e = tl.exp(z)
        sums += e
        if HAS_MOMENT:
            moments += tl.where(e > 0, e * z, 0.0)
        if HAS_SQUARE:
            squares += e * e
        if KEEPS:
            tl.store(kept + row * kept_stride + start + place, e.to(kept.dtype.element_ty), mask=inside)
    tl.store(maximum + row, m)
    tl.store(total + row, tl.sum(sums, axis=0))
    if HAS_MOMENT:
        tl.store(moment + row, tl.sum(moments, axis=0))
    if HAS_SQUARE:
        tl.store(square + row, tl.sum(squares, axis=0))
    column = tl.load(target + row) - first
    here = (column >= 0) & (column < columns)
    tl.store(target_logit + row, tl.load(logits + column, mask=here), mask=here)


@triton.jit(do_not_specialize=["first"])
def _gradient(  # type: ignore[no-untyped-def]
    source,
    row_stride,
    columns,
    shift,
    incoming,
    at_target,
    target,
    first,
    out,
    out_stride,
    EXPONENTIATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(source + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(shift + row)
    if EXPONENTIATED:
        p = x * tl.exp(by)
    else:
        p = tl.exp(x + by)
    gradient = -tl.load(incoming + row) * p
    is_target = column == tl.load(target + row) - first
    gradient = tl.where(is_target, tl.load(at_target + row), gradient)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=inside)


def _block(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))


class TritonPasses:
    """See ``softmax_passes.Passes``. Rows of all matrices are contiguous, as is every [N]."""

    def exponentials(
        self, logits: Tensor, targets: Targets, sums: ChunkSums, target_logit: Tensor, kept: Tensor | None
    ) -> None:
        positions, columns = logits.shape
        if not positions:
            return
        unused = sums.total  # a pointer that the kernel does not follow
        _exponentials[(positions,)](
            logits,
            logits.stride(0),
            columns,
            targets.ids,
            targets.first,
            sums.maximum,
            sums.total,
            unused if sums.moment is None else sums.moment,
            unused if sums.square is None else sums.square,
            target_logit,
            unused if kept is None else kept,
            0 if kept is None else kept.stride(0),
            HAS_MOMENT=sums.moment is not None,
            HAS_SQUARE=sums.square is not None,
            KEEPS=kept is not None,
            BLOCK=_block(columns),
            num_warps=_WARPS,
        )

    def gradient(
        self,
        source: Tensor,
        shift: Tensor,
        incoming: Tensor,
        at_target: Tensor,
        targets: Targets,
        out: Tensor,
        exponentiated: bool,
    ) -> None:
        positions, columns = out.shape
        if not positions:
            return
        block = _block(columns)
        _gradient[(positions, triton.cdiv(columns, block))](
            source,
            source.stride(0),
            columns,
            shift,
            incoming,
            at_target,
            targets.ids,
            targets.first,
            out,
            out.stride(0),
            EXPONENTIATED=exponentiated,
            BLOCK=block,
            num_warps=_WARPS,
        )
