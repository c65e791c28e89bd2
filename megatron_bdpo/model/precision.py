"""What a run computes in: fp32, half precision, or FP8 through Transformer Engine by Megatron's own flags.

In FP8 the linear layers inside the transformer's layers quantise their inputs and weights. Attention, norms and the
output layer stay in half precision; log-probs, loss, gradients and master weights in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: FP8 recipe -> multiple that the sides of its matrices must be: the first two as Megatron's
#: ``fp8_utils.get_fp8_align_size``; blockwise scales tiles of 128 x 128. Their scales follow from the tensor at hand.
FP8_MULTIPLES = {"tensorwise": 16, "mxfp8": 32, "blockwise": 128}

#: FP8 recipe -> the least compute capability that has it: Ada and Hopper, Hopper, Blackwell.
FP8_CAPABILITIES = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@dataclass(frozen=True)
class Precision:
    """The precision of a run.

    Attributes:
        dtype: of weights and activations.
        fp8_recipe: one of FP8_MULTIPLES, or None.
        tf32: fp32's matrix products read their operands with 10 bits of mantissa, as Transformer Engine's do.
    """

    dtype: torch.dtype
    fp8_recipe: str | None = None
    tf32: bool = False

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


def forget_quantisation_state(model: torch.nn.Module) -> None:
    """Have ``model`` load no ``_extra_state``, whatever a checkpoint holds of it.

    That is where Transformer Engine keeps delayed scaling's history, as a pickle: it runs what the pickle names (before
    2.16.1, and 2.17.0) or refuses the checkpoint. The recipes here follow from the tensors at hand and have no history,
    and a model that was pretrained with one is a model all the same.
    """

    def forget(module: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in state_dict:
            if _EXTRA_STATE.search(name):
                state_dict[name] = torch.empty(0, dtype=torch.uint8)  # Transformer Engine's own word for none

    model.register_load_state_dict_pre_hook(forget)


_EXTRA_STATE = re.compile(r"(^|\.)_extra_state\d*$")  # Megatron numbers those of grouped experts
