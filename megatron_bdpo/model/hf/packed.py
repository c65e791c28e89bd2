"""Files whose tensors are not those that a family's rules name: views that present the ones as the others.

A view is a checkpoint itself: ``tensors`` has the names and shapes that it presents, ``rows`` makes them of what is
stored, and never more than is asked for. gpt-oss stores the experts of a layer in one tensor:

    mlp.experts.gate_up_proj       [E, H, 2F]  columns gate 0, up 0, gate 1, up 1, ...
    mlp.experts.gate_up_proj_bias  [E, 2F]     likewise
    mlp.experts.down_proj          [E, F, H]
    mlp.experts.down_proj_bias     [E, H]

or, in the place of a projection, its transpose in MXFP4: ``_blocks`` [E, rows, columns / 32, 16], two 4-bit numbers
to a byte, and ``_scales`` [E, rows, columns / 32], exponents of 2 (OCP Microscaling Formats 1.0; the same as in
transformers' ``integrations/mxfp4.py``).

Symbols: E experts, H hidden, F MLP of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint, StoredTensor
from megatron_bdpo.model.hf.tensors import Dimensions

_STACK = re.compile(r"(?P<layer>.*\.mlp\.experts)\.(?P<name>(?:gate_up|down)_proj(?:_bias|_blocks)?)$")
_ONE = re.compile(r"(?P<layer>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<name>gate|up|down)_proj\.(?P<kind>weight|bias)$")

#: The numbers of four bits: sign, two of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK = 32
_BIAS = 127  # of exponents


class UnpackedExperts(HuggingFaceCheckpoint):
    """gpt-oss's files with a matrix and a bias for each expert and projection, as other families have them."""

    def __init__(self, checkpoint: HuggingFaceCheckpoint, sizes: Dimensions) -> None:
        """View a checkpoint. What has another shape than the sizes say keeps its own name, and ``check`` names it."""
        self.stored = checkpoint
        tensors = dict(checkpoint.tensors)
        for name, tensor in checkpoint.tensors.items():
            found = _STACK.match(name)
            if found and _is_whole(tensor.shape, found["name"], sizes):
                del tensors[name]
                tensors.pop(name.replace("_blocks", "_scales"), None)
                dtype = "BF16" if name.endswith("_blocks") else tensor.dtype
                for one, shape in _ones(found["layer"], found["name"], sizes):
                    tensors[one] = StoredTensor(tensor.file, dtype, shape)
        super().__init__(checkpoint.directory, tensors)

    def rows(self, name: str, start: int, stop: int, columns: tuple[slice, ...] = ()) -> Tensor:
        """As ``HuggingFaceCheckpoint`` has it."""
        found = _ONE.match(name)
        if not found or name in self.stored.tensors:
            return self.stored.rows(name, start, stop, columns)
        expert, gated = int(found["expert"]), found["name"] != "down"
        stack = f"{found['layer']}.{'gate_up' if gated else 'down'}_proj"
        # Of rows 2 start ... 2 stop of gate and up, every second one.
        rows = slice(2 * start, 2 * stop) if gated else slice(start, stop)
        own = slice(int(found["name"] == "up"), None, 2) if gated else slice(None)
        if found["kind"] == "bias":
            return self._expert(f"{stack}_bias", expert, rows)[own]
        (across,) = columns or (slice(None),)
        if f"{stack}_blocks" in self.stored.tensors:
            blocks, scales = (self._expert(f"{stack}_{part}", expert, rows)[own] for part in ("blocks", "scales"))
            return dequantised(blocks, scales)[:, across]
        return self._expert(stack, expert, across, rows).T[own]

    def close(self) -> None:
        """Let go of the file that was read last."""
        self.stored.close()

    def _expert(self, stack: str, expert: int, *places: slice) -> Tensor:
        return self.stored.rows(stack, expert, expert + 1, places)[0]


class PackedExperts(HuggingFaceCheckpoint):
    """The way back: the tensors of gpt-oss, of a directory that holds those of every expert."""

    def __init__(self, checkpoint: HuggingFaceCheckpoint, sizes: Dimensions) -> None:
        """View a checkpoint."""
        self.plain, self.sizes = checkpoint, sizes
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in checkpoint.tensors.items():
            found = _ONE.match(name)
            if not found:
                tensors[name] = tensor
                continue
            stack = "down_proj" if found["name"] == "down" else "gate_up_proj"
            stack += "_bias" if found["kind"] == "bias" else ""
            tensors[f"{found['layer']}.{stack}"] = StoredTensor(tensor.file, tensor.dtype, _stacked(stack, sizes))
        super().__init__(checkpoint.directory, tensors)

    def rows(self, name: str, start: int, stop: int, columns: tuple[slice, ...] = ()) -> Tensor:
        """As ``HuggingFaceCheckpoint`` has it: experts ``start`` to ``stop`` of a stack."""
        found = _STACK.match(name)
        if not found:
            return self.plain.rows(name, start, stop, columns)
        experts = [self._packed(found["layer"], found["name"], expert) for expert in range(start, stop)]
        return torch.stack(experts)[(slice(None), *columns)]

    def close(self) -> None:
        """Let go of the file that was read last."""
        self.plain.close()

    def _packed(self, layer: str, stack: str, expert: int) -> Tensor:
        kind = "bias" if stack.endswith("_bias") else "weight"
        names = ("gate", "up") if stack.startswith("gate_up") else ("down",)
        found = (f"{layer}.{expert}.{name}_proj.{kind}" for name in names)
        parts = [self.plain.rows(name, 0, self.plain.tensors[name].shape[0]) for name in found]
        rows = torch.stack(parts, dim=1).flatten(0, 1)  # one from each in turn
        return rows.T.contiguous() if rows.dim() == 2 else rows


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 to bf16, exactly: [..., B, 16] and [..., B] of uint8 -> [..., 32 B]."""
    numbers = torch.tensor([*_FP4, *(-number for number in _FP4)], dtype=torch.float32)
    pairs = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)  # the lower half of a byte comes first
    exponents = (scales.to(torch.int32) - _BIAS).unsqueeze(-1)
    return torch.ldexp(numbers[pairs.long()], exponents).flatten(-2).to(torch.bfloat16)


def _stacked(stack: str, sizes: Dimensions) -> tuple[int, ...]:
    """Shape of a stack."""
    inner, outer = (2 * sizes.ffn, sizes.hidden) if stack.startswith("gate_up") else (sizes.hidden, sizes.ffn)
    if stack.endswith("_blocks"):
        return sizes.experts, inner, outer // _BLOCK, _BLOCK // 2
    return (sizes.experts, inner) if stack.endswith("_bias") else (sizes.experts, outer, inner)


def _is_whole(shape: tuple[int, ...], stack: str, sizes: Dimensions) -> bool:
    return shape == _stacked(stack, sizes)


def _ones(layer: str, stack: str, sizes: Dimensions) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the experts' own tensors in a stack."""
    names: Mapping[str, tuple[int, int]] = (
        dict.fromkeys(("gate", "up"), (sizes.ffn, sizes.hidden))
        if stack.startswith("gate_up")
        else {"down": (sizes.hidden, sizes.ffn)}
    )
    kind = "bias" if stack.endswith("_bias") else "weight"
    return [
        (f"{layer}.{expert}.{name}_proj.{kind}", shape[:1] if kind == "bias" else shape)
        for expert in range(sizes.experts)
        for name, shape in names.items()
    ]
