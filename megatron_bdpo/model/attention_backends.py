"""What computes attention along a plan, behind one call: torch's varlen flash kernel, Transformer Engine, or SDPA.

All of them take the queries of a plan's runs one after another, each run's gathered keys likewise, and a bottom-right
causal mask: the last query of a run sees all of the run's keys. Packing, shared prompts and context parallelism are in
the plan, so every backend has them.

Shapes: Q queries and K keys of all runs, n query heads and g key/value heads of this rank, d head size of queries and
keys, e of values.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_bdpo.errors import UserError
from megatron_bdpo.model import varlen
from megatron_bdpo.model.attention_layer import Layer


class Runs(Protocol):
    """What a backend reads of an ``attention.AttentionPlan``. R runs.

    Attributes:
        query_starts, key_starts: [R + 1] int32 on the device, where each run begins.
        query_lengths, key_lengths: the same as lengths, on the host.
    """

    query_starts: Tensor
    key_starts: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


class Backend(Protocol):
    """Attention of ``query`` [Q, n, d] over ``key`` [K, g, d] and ``value`` [K, g, e]. Returns [Q, n, e].

    A query sees the keys up to itself, no further back than ``layer.window`` where there is one. ``sinks`` [n]: of a
    layer that has them.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Runs, layer: Layer, sinks: Tensor | None = None
    ) -> Tensor: ...


def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, plan: Runs, layer: Layer, sinks: Tensor | None = None
) -> Tensor:
    """The oracle, for any device and every layer: one call for each run."""
    runs = zip(query.split(plan.query_lengths), key.split(plan.key_lengths), value.split(plan.key_lengths), strict=True)
    if layer.softcap is None and sinks is None:
        return torch.cat([_sdpa(q, k, v, layer) for q, k, v in runs])
    # Scores of one run at a time: those of the others are made again when their gradients come.
    again = functools.partial(checkpoint, _eager, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(q, k, v, layer, sinks) for q, k, v in runs])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
    """One run by torch's scaled_dot_product_attention."""
    mask = None
    if layer.window is not None or query.shape[0] != key.shape[0]:
        mask = _bottom_right_mask(query.shape[0], key.shape[0], layer.window, query.device)
    out = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=layer.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def _eager(query: Tensor, key: Tensor, value: Tensor, layer: Layer, sinks: Tensor | None) -> Tensor:
    """One run written out: scores, cap, softmax with sinks, all of them in fp32 or the inputs' wider type."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))  # r query heads share a key head
    scores = torch.einsum("qgrd,kgd->grqk", grouped, key.to(dtype)) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    mask = _bottom_right_mask(query.shape[0], key.shape[0], layer.window, query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype).view(key.shape[1], -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[0]]  # what a sink takes is nobody's
    return torch.einsum("grqk,kge->qgre", weights, value.to(dtype)).flatten(1, 2).to(value.dtype)


def _bottom_right_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where query i, which is key ``keys - queries + i`` itself, may look."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance <= window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, plan: Runs, layer: Layer, sinks: Tensor | None = None) -> Tensor:
    """One flash-attention call for all runs."""
    attend = varlen.installed()
    assert attend is not None and sinks is None, "check_backend or default_backend comes first"
    starts, longest = (plan.query_starts, plan.key_starts), (max(plan.query_lengths), max(plan.key_lengths))
    return attend(query, key, value, starts, longest, layer)


def _transformer_engine(
    query: Tensor, key: Tensor, value: Tensor, plan: Runs, layer: Layer, sinks: Tensor | None = None
) -> Tensor:
    """Transformer Engine's choice among its own kernels (FlashAttention, cuDNN), in one call for all runs."""
    assert sinks is None and layer.softcap is None, "check_backend or default_backend comes first"
    module = _te_module(query.shape[1], key.shape[1], query.shape[2], value.shape[2], layer.scale)
    out: Tensor = module(
        query,
        key,
        value,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        cu_seqlens_q=plan.query_starts,
        cu_seqlens_kv=plan.key_starts,
        max_seqlen_q=max(plan.query_lengths),
        max_seqlen_kv=max(plan.key_lengths),
        window_size=(-1 if layer.window is None else layer.window, 0),
    )
    return out.view(*query.shape[:2], value.shape[2])


@functools.cache
def _te_module(heads: int, groups: int, head_size: int, value_size: int, scale: float) -> Any:
    """It has no weights, so all layers share it."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_size if head_size == value_size else (head_size, value_size),
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=scale,
    )


#: By the name that --pair-attention takes.
BACKENDS: dict[str, Backend] = {"varlen": _varlen, "te": _transformer_engine, "sdpa": _run_by_run}


DESCRIPTIONS = {
    "varlen": "torch's varlen flash attention, one call for all runs of a pack",
    "te": "Transformer Engine's, one call for all runs of a pack",
    "sdpa": "torch's scaled_dot_product_attention, a call for each run (with caps or sinks: written out)",
}


def default_backend(on_gpu: bool, dtype: torch.dtype, layer: Layer) -> str:
    """That which works for this layer, in the order varlen, Transformer Engine's, SDPA."""
    if not on_gpu or dtype not in _HALF:
        return "sdpa"
    if not varlen.why_not(layer):
        return "varlen"
    return "sdpa" if _te_why_not(layer) else "te"


_HALF = (torch.bfloat16, torch.float16)  # all that flash kernels take


def _te_why_not(layer: Layer) -> str:
    """Why Transformer Engine cannot attend so; "" if it can. Read in the sources of 2.14.0 to 2.20.2.

    Values of another size than keys all of them take. A cap came with 2.20, for FlashAttention 2 and 3. Sinks are a
    weight of its module, which all layers share here; cuDNN alone has them, for packed sequences from 9.18 on.
    """
    if layer.softcap is not None:
        return "Transformer Engine's attention caps no scores (2.14 to 2.19; 2.20 with FlashAttention, not tried)"
    if layer.sinks:
        return "Transformer Engine's attention takes no sinks in a call: they are a weight of its own module"
    return "" if _has_transformer_engine() else "Transformer Engine is not installed"


@functools.cache
def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def check_backend(name: str, on_gpu: bool, dtype: torch.dtype, layer: Layer) -> None:
    """Refuse a backend that cannot work here.

    Raises:
        UserError: with the reason and the way out.
    """
    reason = ""
    if name != "sdpa" and not (on_gpu and dtype in _HALF):
        reason = "its kernels need a GPU, and --bf16 or --fp16"
    elif name == "varlen":
        reason = varlen.why_not(layer)
    elif name == "te":
        reason = _te_why_not(layer)
    if reason:
        raise UserError(f"--pair-attention {name}: {reason}. Leave it out: the best that works here is taken.")


def why_slow(name: str, on_gpu: bool, dtype: torch.dtype, layer: Layer) -> str:
    """A warning where ``default_backend`` has found nothing better than a call for each run, though there is a GPU."""
    if name != "sdpa" or not on_gpu or dtype not in _HALF:
        return ""
    reasons = f"{varlen.why_not(layer)}, and {_te_why_not(layer)}"
    if layer.softcap is not None or layer.sinks:
        return (
            f"warning: {reasons}: attention is a call for each run, with scores of queries x keys x heads in fp32, "
            "which is slower and takes more memory. Shorter packs (--seq-length) take less."
        )
    return (
        f"warning: {reasons}: attention is a call for each run, many of them with a mask of queries x keys, which is "
        "slower and takes more memory. Install Transformer Engine (pip install '.[gpu]') or a torch whose varlen "
        "attention fits."
    )
