"""What a run computes in: fp32, half precision, or FP8 through Transformer Engine by Megatron's own flags.

In FP8 the linear layers inside the transformer's layers quantise their inputs and weights. Attention, norms and the
output layer stay in half precision; log-probs, loss, gradients and master weights in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: FP8 recipe -> multiple that the sides of its matrices must be. The first two and mxfp8's as Megatron's
#: ``fp8_utils.get_fp8_align_size``; blockwise scales tiles of 128 x 128.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}

#: FP8 recipe -> the least compute capability that has it: Ada and Hopper, Hopper, Blackwell.
FP8_CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@dataclass(frozen=True)
class Precision:
    """The precision of a run.

    Attributes:
        dtype: of weights and activations.
        fp8_recipe: one of FP8_MULTIPLES, or None.
    """

    dtype: torch.dtype
    fp8_recipe: str | None = None

    @property
    def row_multiple(self) -> int:
        """What the positions of a pack that a rank holds have to be a multiple of. 8 suits half precision's kernels."""
        return FP8_MULTIPLES.get(self.fp8_recipe or "", 8)

    def misfits(self, sides: Mapping[str, int]) -> list[str]:
        """Those sides of this rank's weight matrices that the FP8 recipe cannot quantise, by name, in words."""
        if self.fp8_recipe is None:
            return []
        unit = self.row_multiple
        return [f"{name} {size} (not a multiple of {unit})" for name, size in sides.items() if size % unit]

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return f"{name}, linear layers in FP8 ({self.fp8_recipe})" if self.fp8_recipe else name


@contextlib.contextmanager
def quantisation_history_kept(chunks: list[Any]) -> Iterator[None]:
    """Whatever runs forward inside the block leaves no trace in the scales of delayed scaling.

    Transformer Engine records the largest value of each tensor in every forward pass, with gradients or without, and
    derives the next scales from that history. A pass that scores the reference is not a step of the policy: with its
    values in the history, the first step would quantise otherwise than the reference was scored.
    """
    before = {id(tensor): (tensor, tensor.clone()) for tensor in _history(chunks)}
    try:
        yield
    finally:
        for tensor in _history(chunks):
            if id(tensor) in before:
                tensor.copy_(before[id(tensor)][1])
            else:  # made by the first pass of all, as Transformer Engine makes them: no maxima, a scale of one
                tensor.fill_(1.0 if tensor.ndim == 1 else 0.0)


def _history(chunks: list[Any]) -> Iterator[torch.Tensor]:
    """[modules' tensors]: scales [n] and histories of maxima [steps, n] of all modules that keep them."""
    for chunk in chunks:
        for module in chunk.modules():
            for name, meta in getattr(module, "fp8_meta", {}).items():
                if name.startswith("scaling_") and hasattr(meta, "amax_history"):
                    yield meta.scale
                    yield meta.amax_history
