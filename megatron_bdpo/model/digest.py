"""A fingerprint of a model's weights that does not depend on how they are split over ranks.

Every element is hashed together with its parameter's name and its place in the whole (unsharded) tensor, and the
hashes are added modulo 2^64: order, tensor parallelism and pipeline stages do not matter, one changed bit does. Rows
that only pad the vocabulary, and so depend on the layout, are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_bdpo.model.shards import is_main_copy, weight_shards

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements hashed at a time. Their int64 temporaries, 8 MB each, stay in a core's cache: 2^24 at a time take 3.5 times
#: as long on a CPU. With fewer than this a GPU would wait for launches.
_CHUNK = 1 << 20
_MIX_1, _MIX_2 = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def weights_digest(model: Iterable[Any], vocab_size: int) -> str:
    """Fingerprint of the weights of all ranks together, as 16 hex digits. Collective: one all-reduce of one number.

    Args:
        model: this rank's model chunks, unwrapped.
        vocab_size: entries of the tokenizer; vocabulary rows beyond are padding.
    """
    total = torch.zeros((), dtype=torch.int64)
    for shard in weight_shards(model):
        if is_main_copy(shard):
            total += _hash_shard(shard, vocab_size).cpu()
    if torch.distributed.is_initialized():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = total.to(device)
        torch.distributed.all_reduce(total)
    return f"{int(total) & 0xFFFFFFFFFFFFFFFF:016x}"


def _hash_shard(shard: ShardedTensor, vocab_size: int) -> Tensor:
    """Sum of the element hashes of one shard, wrapping modulo 2^64."""
    assert shard.data is not None
    data = shard.data.detach()
    rows = data.reshape(data.shape[0] if data.dim() else 1, -1)  # [rows, elements per row]
    strides = _strides(shard.global_shape)
    own_strides = strides[shard.prepend_axis_num :] or [1]
    base = sum(offset * stride for offset, stride in zip(shard.global_offset, strides, strict=True))
    column = _linear_index(data.shape[1:], own_strides[1:], data.device)
    # Only the vocabulary axis of embeddings and output layers may change its size with the layout.
    limit = vocab_size * own_strides[0] if shard.allow_shape_mismatch else None
    name = int.from_bytes(hashlib.sha256(shard.key.encode()).digest()[:8], "little", signed=True)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].contiguous()
        row = torch.arange(start, start + part.shape[0], device=data.device) * own_strides[0]
        index = base + row[:, None] + column[None, :]
        bits = part.view(_BITS[part.element_size()]).to(torch.int64)
        hashed = _mix(bits, index * _MIX_1 + name)
        total += (hashed if limit is None else torch.where(index < limit, hashed, 0)).sum()
    return total


def _mix(bits: Tensor, place: Tensor) -> Tensor:
    mixed = (bits ^ place) * _MIX_2
    mixed = (mixed ^ (mixed >> 29)) * _MIX_1
    return mixed ^ (mixed >> 32)


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _linear_index(shape: Sequence[int], strides: Sequence[int], device: torch.device) -> Tensor:
    """Sum of index times stride over the axes, flattened."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, stride in zip(shape, strides, strict=True):
        index = index.unsqueeze(-1) + torch.arange(size, device=device) * stride
    return index.flatten()
