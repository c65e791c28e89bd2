"""Attention over packed pair groups: the ``core_attention`` of every layer.

The plan (built on the host, see ``data.layout``) is a list of runs: contiguous queries that attend to a gathered list
of keys under a bottom-right causal mask. Packing, shared prompts, plain sequences and context parallelism, where each
rank has the queries of its own positions and the keys of all, are the same few lines.

Shapes: T positions of this rank (the pack's length over the C context-parallel ranks), R runs, K gathered keys,
n query heads and g key/value heads of this rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import functional

from megatron_bdpo.errors import UserError


@dataclass
class AttentionPlan(PackedSeqParams):
    """Travels through Megatron's layers as their ``packed_seq_params``, untouched, to :class:`PairAttention`.

    Its ``qkv_format`` is not 'thd', so no layer acts on it; ``max_seqlen_*`` size the rotary table.
    """

    positions: Tensor = field(default_factory=lambda: torch.empty(0))  # [T] position within its sequence
    key_index: Tensor = field(default_factory=lambda: torch.empty(0))  # [K]
    query_starts: Tensor = field(default_factory=lambda: torch.empty(0))  # [R + 1] int32
    key_starts: Tensor = field(default_factory=lambda: torch.empty(0))  # [R + 1] int32
    query_lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()

    @property
    def padding(self) -> Tensor:
        """[T] bool: positions that hold no token. They come last."""
        used = sum(self.query_lengths)
        return torch.arange(self.positions.numel(), device=self.positions.device) >= used


class PairAttention(MegatronModule):
    """Softmax attention along an :class:`AttentionPlan`; torch's varlen flash kernel on a GPU, SDPA elsewhere.

    Positions that no run covers (padding) yield zeros and receive no gradient.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        # Nothing to do for config.apply_query_key_layer_scaling: Megatron divides the scores by the layer's number and
        # multiplies them again within its fp32 softmax, to spare fp16 large scores; these kernels hold them in fp32.
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.context_group = None if pg_collection is None else pg_collection.cp
        self.window: int | None = config.window_size[0] if windowed and config.window_size[0] >= 0 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Collectives with context parallelism: one all-gather of keys and values forward, one reduce-scatter of their
        gradients backward, [C T, g, 2 d].

        Args:
            query: [T, 1, n, d]; key, value: [T, 1, g, d], g divides n.
            packed_seq_params: the :class:`AttentionPlan`; every other mask argument is ignored by design, because
                the plan says all there is to say.

        Returns:
            [T, 1, n * d]
        """
        if not isinstance(packed_seq_params, AttentionPlan):
            raise TypeError("PairAttention needs an AttentionPlan as packed_seq_params: use training.forward")
        plan = packed_seq_params
        used = sum(plan.query_lengths)
        query = query.squeeze(1)
        keys, values = (part.index_select(0, plan.key_index) for part in self._of_all_ranks(key, value))
        if used:
            is_half = query.dtype in (torch.bfloat16, torch.float16)  # all that flash kernels take
            attend = _varlen if query.is_cuda and is_half else _sdpa_per_run
            out = attend(query[:used], keys, values, plan, self.softmax_scale, self.window)
        else:
            # Nothing to attend, yet keys and values stay in the graph: their backward is a collective.
            out = query[:0] + (keys.sum() + values.sum())
        out = functional.pad(out.flatten(1), (0, 0, 0, query.shape[0] - used))
        return out.unsqueeze(1)

    def _of_all_ranks(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [C T, g, d] of the whole pack, those of context-parallel rank 0 first."""
        if self.context_group is not None and self.context_group.size() > 1:
            both = torch.cat([key, value], dim=-1)
            key, value = gather_from_sequence_parallel_region(both, group=self.context_group).chunk(2, dim=-1)
        return key.squeeze(1), value.squeeze(1)


def _sdpa_per_run(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, window: int | None
) -> Tensor:
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


def _varlen(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, window: int | None) -> Tensor:
    """One flash-attention call for all runs. Returns [used, n, d]."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UserError(
            f"torch {torch.__version__} has no torch.nn.attention.varlen, which attention on a GPU needs. "
            "Use torch 2.11 or newer."
        ) from error
    out: Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only if return_aux is asked for
        query,
        key,
        value,
        plan.query_starts,
        plan.key_starts,
        max(plan.query_lengths),
        max(plan.key_lengths),
        scale=scale,
        window_size=(-1 if window is None else window, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out
