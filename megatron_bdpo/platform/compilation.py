"""Fusions that Megatron has for others than us: what it leaves to Transformer Engine, and what it wants Apex for.

Rotary embedding is some eight kernels for the queries and as many for the keys of every layer, each of which reads and
writes them whole. Compiled it is one. Megatron's own fused version exists in Transformer Engine alone.

Gradient accumulation: Megatron does not build its ColumnParallelLinear with it where Apex's extension is missing, which
that layer's backward pass calls. The output layer is one, and takes its configuration from the same object as
Transformer Engine's layers, which need no Apex. What is scored here never goes through that backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers


def fuse_rotary_embedding(fused: bool) -> None:
    """Have Megatron's local layers use a compiled version of its function, or its own again."""
    rope_utils._apply_rotary_pos_emb_bshd = _compiled() if fused else _eager()


def build_output_layer_without_apex(allowed: bool) -> None:
    """Have Megatron build ColumnParallelLinear with gradient accumulation, or ask for Apex again as it does by itself.

    Of models in which the output layer alone is one.
    """
    own_answer = _has_apex()
    layers._grad_accum_fusion_available = allowed or own_answer


@functools.cache  # Megatron's own answer, which the first call finds
def _has_apex() -> bool:
    return bool(layers._grad_accum_fusion_available)


@functools.cache  # Megatron's own, which the first call finds
def _eager() -> Callable[..., Any]:
    original: Callable[..., Any] = rope_utils._apply_rotary_pos_emb_bshd
    return original


@functools.cache
def _compiled() -> Callable[..., Any]:
    # With sizes as variables, numbers would be too: the scale of the angles, a Python float, becomes a tensor on the
    # CPU with a C++ kernel of its own, which takes a compiler. It is the same in every call.
    torch._dynamo.config.specialize_float = True
    # Packs differ in length, queries and keys in heads: compiled once for all sizes, not anew for some.
    return torch.compile(_eager(), dynamic=True)
