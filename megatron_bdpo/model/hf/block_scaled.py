"""Weights in FP8, a scale for each block of 128 x 128 (DeepSeek-V3), read as bf16.

name.weight            [rows, columns] of E4M3
name.weight_scale_inv  [rows / 128, columns / 128], rounded up: what a block is multiplied with
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.tensors import Dimensions

_BLOCK = 128
_SCALE = "_scale_inv"
_FP8 = "F8_E4M3"


class BlockScaled(HuggingFaceCheckpoint):
    """A view whose quantised tensors are in bf16. Weights whose scales are of other blocks stay as they are stored."""

    def __init__(self, checkpoint: HuggingFaceCheckpoint, sizes: Dimensions) -> None:
        """View a checkpoint."""
        self.stored = checkpoint
        tensors = dict(checkpoint.tensors)
        for name, tensor in checkpoint.tensors.items():
            scales = checkpoint.tensors.get(name + _SCALE)
            if tensor.dtype == _FP8 and scales and scales.shape == tuple(-(-each // _BLOCK) for each in tensor.shape):
                tensors[name] = tensor._replace(dtype="BF16")
                del tensors[name + _SCALE]
        super().__init__(checkpoint.directory, tensors)

    def rows(self, name: str, start: int, stop: int, columns: tuple[slice, ...] = ()) -> Tensor:
        """As ``HuggingFaceCheckpoint`` has it."""
        part = self.stored.rows(name, start, stop, columns)
        if self.tensors[name] == self.stored.tensors[name]:
            return part
        (across,) = columns or (slice(0, self.tensors[name].shape[1]),)
        first, end, _ = across.indices(self.tensors[name].shape[1])
        blocks = slice(first // _BLOCK, -(-end // _BLOCK))
        scales = self.stored.rows(name + _SCALE, start // _BLOCK, -(-stop // _BLOCK), (blocks,)).float()
        by_row = scales.repeat_interleave(_BLOCK, 0)[start % _BLOCK :][: stop - start]
        each = by_row.repeat_interleave(_BLOCK, 1)[:, first % _BLOCK :][:, : end - first]
        return (part.float() * each).to(torch.bfloat16)

    def close(self) -> None:
        """Let go of the file that was read last."""
        self.stored.close()
