"""What computes attention along a plan, behind one call: torch's varlen flash kernel, Transformer Engine, or SDPA.

All of them take the queries of a plan's runs one after another, each run's gathered keys likewise, and a bottom-right
causal mask: the last query of a run sees all of the run's keys. Packing, shared prompts and context parallelism are in
the plan, so every backend has them.

Shapes: Q queries and K keys of all runs, n query heads and g key/value heads of this rank, d head size.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from megatron_bdpo.errors import UserError
from megatron_bdpo.model import varlen


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
    """Attention of ``query`` [Q, n, d] over ``key`` and ``value`` [K, g, d]. Returns [Q, n, d].

    A query sees the keys up to itself, no further back than ``window`` where there is one.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Runs, scale: float, window: int | None
    ) -> Tensor: ...


def _sdpa_per_run(query: Tensor, key: Tensor, value: Tensor, plan: Runs, scale: float, window: int | None) -> Tensor:
    """The oracle, for any device: one scaled_dot_product_attention per run. Returns [used, n, d]."""
    outputs = []
    runs = zip(query.split(plan.query_lengths), key.split(plan.key_lengths), value.split(plan.key_lengths), strict=True)
    for q, k, v in runs:
        mask = None
        if window is not None or q.shape[0] != k.shape[0]:
            mask = _bottom_right_mask(q.shape[0], k.shape[0], window, q.device)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _bottom_right_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where query i, which is key ``keys - queries + i`` itself, may look."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance <= window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, plan: Runs, scale: float, window: int | None) -> Tensor:
    """One flash-attention call for all runs."""
    attend = varlen.installed()
    assert attend is not None, "check_backend or default_backend comes first"
    starts, longest = (plan.query_starts, plan.key_starts), (max(plan.query_lengths), max(plan.key_lengths))
    return attend(query, key, value, starts, longest, scale, window)


def _transformer_engine(
    query: Tensor, key: Tensor, value: Tensor, plan: Runs, scale: float, window: int | None
) -> Tensor:
    """Transformer Engine's choice among its own kernels (FlashAttention, cuDNN), in one call for all runs."""
    module = _te_module(query.shape[1], key.shape[1], query.shape[2], scale)
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
        window_size=(-1 if window is None else window, 0),
    )
    return out.view(query.shape)


@functools.cache
def _te_module(heads: int, groups: int, head_size: int, scale: float) -> Any:
    """It has no weights, so all layers share it."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=scale,
    )


#: By the name that --pair-attention takes.
BACKENDS: dict[str, Backend] = {"varlen": _varlen, "te": _transformer_engine, "sdpa": _sdpa_per_run}


DESCRIPTIONS = {
    "varlen": "torch's varlen flash attention, one call for all runs of a pack",
    "te": "Transformer Engine's, one call for all runs of a pack",
    "sdpa": "torch's scaled_dot_product_attention, a call for each run",
}


class Layer(NamedTuple):
    """What the choice of a backend asks of a layer."""

    head_size: int
    scale: float  # of the scores
    window: int | None


def default_backend(on_gpu: bool, dtype: torch.dtype, layer: Layer) -> str:
    """That which works for this layer, in the order varlen, Transformer Engine's, SDPA."""
    if not on_gpu or dtype not in _HALF:
        return "sdpa"
    if not varlen.why_not(*layer):
        return "varlen"
    return "te" if _has_transformer_engine() else "sdpa"


_HALF = (torch.bfloat16, torch.float16)  # all that flash kernels take


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
        reason = varlen.why_not(*layer)
    elif name == "te" and not _has_transformer_engine():
        reason = "Transformer Engine is not installed"
    if reason:
        raise UserError(f"--pair-attention {name}: {reason}. Leave it out: the best that works here is taken.")


def why_slow(name: str, on_gpu: bool, dtype: torch.dtype, layer: Layer) -> str:
    """A warning where ``default_backend`` has found nothing better than a call for each run, though there is a GPU."""
    if name != "sdpa" or not on_gpu or dtype not in _HALF:
        return ""
    why = varlen.why_not(*layer)
    return (
        f"warning: {why}, and Transformer Engine is not installed: attention is a call for each run, many of them with "
        "a mask of queries x keys, which is slower and takes more memory. Install Transformer Engine "
        "(pip install '.[gpu]') or a torch whose varlen attention fits."
    )
