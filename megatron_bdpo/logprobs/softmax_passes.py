"""The elementwise work on a chunk's logits in torch's own operations: for any device, and the Triton kernels' oracle.

On a GPU each operation below would be a pass over the chunk, the largest thing that the log-probs have; there
``softmax_triton`` does the same in one pass forward and one backward.

Shapes: N scored positions, c vocabulary rows of a chunk.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Where a chunk has the positions' targets."""

    ids: Tensor  # [N] int64 token ids
    first: int  # token id of the chunk's first column; a target may be left or right of the chunk

    def columns(self, count: int) -> tuple[Tensor, Tensor]:
        """[N, 1] column of each target, 0 where the chunk does not have it; [N, 1] whether it does."""
        column = (self.ids - self.first)[:, None]
        here = (column >= 0) & (column < count)
        return column.where(here, 0), here


class ChunkSums(NamedTuple):
    """What one chunk says about every position, [N] float32 each."""

    maximum: Tensor  # m, of its logits
    total: Tensor  # sum of exp(z - m)
    moment: Tensor | None = None  # sum of exp(z - m) (z - m), where the entropy is asked for
    square: Tensor | None = None  # sum of exp(z - m)^2, where the collision entropy is

    def each(self, change: Callable[[Tensor], Tensor]) -> ChunkSums:
        """All of them changed."""
        moment = None if self.moment is None else change(self.moment)
        square = None if self.square is None else change(self.square)
        return ChunkSums(change(self.maximum), change(self.total), moment, square)


class Passes(Protocol):
    """The two passes. Both may overwrite what they read."""

    def exponentials(
        self, logits: Tensor, targets: Targets, sums: ChunkSums, target_logit: Tensor, kept: Tensor | None
    ) -> None:
        """Forward, of ``logits`` [N, c] float32: fill ``sums``, the logits of targets that are here, and ``kept``.

        Args:
            target_logit: [N] float32; entries whose target is elsewhere are left alone.
            kept: [N, c] of any floating type, for exp(z - m); or None.
        """

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
        """Backward: -incoming p where a column is not the target, ``at_target`` where it is. All [N] are float32.

        Args:
            source: [N, c], what p is made from: source exp(shift) if ``exponentiated``, else exp(source + shift).
            out: [N, c], perhaps ``source`` itself.
        """


class TorchPasses:
    """See :class:`Passes`."""

    def exponentials(
        self, logits: Tensor, targets: Targets, sums: ChunkSums, target_logit: Tensor, kept: Tensor | None
    ) -> None:
        column, here = targets.columns(logits.shape[1])
        target_logit.copy_(logits.gather(1, column).where(here, target_logit[:, None]).squeeze(1))
        torch.amax(logits, 1, out=sums.maximum)
        exponentials = logits.sub_(sums.maximum[:, None]).exp_()
        torch.sum(exponentials, 1, out=sums.total)
        if sums.moment is not None:
            sums.moment.copy_(torch.special.xlogy(exponentials, exponentials).sum(1))  # 0 log 0 = 0
        if sums.square is not None:
            sums.square.copy_(torch.linalg.vector_norm(exponentials, dim=1)).square_()
        if kept is not None:
            kept.copy_(exponentials)

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
        if exponentiated:
            torch.mul(source, (-incoming * shift.exp())[:, None], out=out)
        else:
            torch.mul(source.add_(shift[:, None]).exp_(), -incoming[:, None], out=out)
        column, here = targets.columns(out.shape[1])
        out.scatter_(1, column, at_target.to(out.dtype)[:, None].where(here, out.gather(1, column)))


@functools.cache
def passes_for(device: torch.device) -> Passes:
    """Triton's on a GPU, if it is installed; its package comes with CUDA builds of torch."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from megatron_bdpo.logprobs.softmax_triton import TritonPasses

        return TritonPasses()
    return TorchPasses()
