"""Multi-latent attention (DeepSeek-V2 and V3) over packed groups: Megatron's layer, along the plan's positions.

The layer makes its rotary embedding itself, of the places in a sequence; here these are ``AttentionPlan.positions``, so
packing, shared prompts and context parallelism are in them. Queries, keys and values are made of two latents:

    q = W_qu norm(W_qd x)          n heads of nope + rope     W_qu x where queries have no latent
    c, r = W_kvd x                 kv_lora_rank, rope
    k, v = W_kvu norm(c)           n heads of nope and of v; r, rotated, is the rest of every head's key

The norms of the latents are layers of their own, whichever implementation: checkpoints name them alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_bdpo.model.attention import AttentionPlan


class PairLatentAttention(MLASelfAttention):
    """Megatron's layer for an :class:`AttentionPlan`."""

    rotary_pos_emb: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        table: torch.nn.Module = self.rotary_pos_emb
        self.rotary_pos_emb = _AlongPlan(table)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The spec's own layers. Megatron's choice would put a norm in front of queries that have no latent."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of this rank's positions, whole: [T, 1, q_lora_rank] and [T, 1, kv_lora_rank + rope].

        Every tensor-parallel rank rotates the same r for its own heads, so that its gradient is a sum over the ranks.
        With sequence parallelism Megatron gathers r, and the backward pass of that sums; local layers give the latents
        in parts, of which Megatron would gather and not sum.
        """
        config = self.config
        latents: list[Tensor] = []
        for linear, size in (
            (getattr(self, "linear_q_down_proj", None), config.q_lora_rank),
            (self.linear_kv_down_proj, config.kv_lora_rank + config.qk_pos_emb_head_dim),
        ):
            if linear is None:
                latents.append(hidden_states)
                continue
            latent, _ = linear(hidden_states)
            if latent.shape[-1] != size:
                latent = gather_from_tensor_model_parallel_region(latent, group=self.tp_group)
                if config.sequence_parallel:
                    # A copy: it would keep what it is a part of.
                    latent = scatter_to_sequence_parallel_region(latent, group=self.tp_group).clone()
            latents.append(latent)
        queries, keys = latents
        if self.tp_group.size() > 1 and not config.sequence_parallel:
            kept, rotated = keys.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
            keys = torch.cat([kept, copy_to_tensor_model_parallel_region(rotated, group=self.tp_group)], dim=-1)
        return queries, keys

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """[T, 1, n, nope + rope] twice, and [T, 1, n, v]; the latents after them."""
        *given, plan = args if packed_seq_params is None else (*args[:2], packed_seq_params)
        if not isinstance(plan, AttentionPlan):
            raise TypeError("PairLatentAttention needs an AttentionPlan as packed_seq_params: use training.forward")
        with self.rotary_pos_emb.along(plan):
            # Without the plan, Megatron takes the rotary embedding's rows as they come.
            return super().get_query_key_value_tensors(hidden_states, *given, None, **kwargs)


class _AlongPlan(torch.nn.Module):
    """A rotary embedding whose rows are those of a plan's positions. It has no weights."""

    def __init__(self, table: torch.nn.Module) -> None:
        super().__init__()
        self.table = table
        self.plan: AttentionPlan | None = None

    @contextlib.contextmanager
    def along(self, plan: AttentionPlan) -> Iterator[None]:
        """The plan that the block inside goes along."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None

    def get_rotary_seq_len(self, *unused: Any) -> int:
        """Positions of the longest sequence."""
        assert self.plan is not None
        return max(self.plan.max_seqlen_q, self.plan.max_seqlen_kv)

    def forward(self, length: int, packed_seq: bool = False) -> Any:
        """[T, 1, 1, rope] angles; with YaRN a factor of sine and cosine beside them."""
        assert self.plan is not None
        found = self.table(length, packed_seq=True)  # the whole table, whichever the context-parallel rank
        if isinstance(found, tuple):
            angles, factor = found
            return angles[self.plan.positions], factor
        return found[self.plan.positions]


def with_latent_attention(spec: Any, norm: Any, column_parallel_linear: Any) -> None:
    """Have a layer's spec build :class:`PairLatentAttention`; changed in place.

    Args:
        norm: builds the latents' norms.
        column_parallel_linear: the layer behind a norm.
    """
    spec.module = PairLatentAttention
    attention = spec.submodules
    attention.linear_q_up_proj = attention.linear_kv_up_proj = column_parallel_linear
    attention.q_layernorm = attention.kv_layernorm = norm or IdentityOp


def norm_with_epsilon(norm: Any, epsilon: float | None) -> Any:
    """A builder of norms whose epsilon is its own, if it has one."""
    if epsilon is None:
        return norm

    def build(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
        built: torch.nn.Module = norm(config=config, hidden_size=hidden_size, eps=epsilon)
        return built

    return build
