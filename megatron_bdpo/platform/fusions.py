"""torch.compile for a small function of Megatron's local layers that it leaves to Transformer Engine to fuse.

Rotary embedding is some eight kernels for the queries and as many for the keys of every layer, each of which reads and
writes them whole. Compiled it is one. Megatron's own fused version exists in Transformer Engine alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def fuse_rotary_embedding(fused: bool) -> None:
    """Have Megatron's local layers use a compiled version of its function, or its own again."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_bshd = _compiled() if fused else _eager()


@functools.cache  # Megatron's own, which the first call finds
def _eager() -> Callable[..., Any]:
    from megatron.core.models.common.embeddings import rope_utils

    original: Callable[..., Any] = rope_utils._apply_rotary_pos_emb_bshd
    return original


@functools.cache
def _compiled() -> Callable[..., Any]:
    # With sizes as variables, numbers would be too: the scale of the angles, a Python float, becomes a tensor on the
    # CPU with a C++ kernel of its own, which takes a compiler. It is the same in every call.
    torch._dynamo.config.specialize_float = True
    # Packs differ in length, queries and keys in heads: compiled once for all sizes, not anew for some.
    return torch.compile(_eager(), dynamic=True)
