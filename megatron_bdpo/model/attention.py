"""Attention over packed groups: the ``core_attention`` of every layer.

The plan (built on the host, see ``data.packs``) is a list of runs: contiguous queries that attend to a gathered list
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

from megatron_bdpo.model.attention_backends import BACKENDS, Layer, default_backend


class KeptKeys:
    """Keys and values of passes whose sequences go on, of every layer of this rank: those of the last pass first."""

    def __init__(self) -> None:
        self._of_layer: dict[int, tuple[Tensor, Tensor]] = {}

    def after(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this pass, [used, g, d], and after them those of the passes before, [F, g, d] each."""
        earlier = self._of_layer.get(layer_number, (key[:0], value[:0]))
        # Also in the first pass a copy: they are parts of one larger tensor, which need not stay.
        whole = torch.cat([key, earlier[0]]), torch.cat([value, earlier[1]])
        self._of_layer[layer_number] = whole
        return whole


@dataclass
class AttentionPlan(PackedSeqParams):
    """Travels through Megatron's layers as their ``packed_seq_params``, untouched, to :class:`PairAttention`.

    Its ``qkv_format`` is not 'thd', so no layer acts on it; ``max_seqlen_*`` size the rotary table.
    """

    positions: Tensor = field(default_factory=lambda: torch.empty(0))  # [T] position within its sequence
    groups: Tensor = field(default_factory=lambda: torch.empty(0))  # [T] number of the pair; of padding 0
    group_count: int = 0
    """Pairs of the whole pack."""
    key_index: Tensor = field(default_factory=lambda: torch.empty(0))  # [K]
    query_starts: Tensor = field(default_factory=lambda: torch.empty(0))  # [R + 1] int32
    key_starts: Tensor = field(default_factory=lambda: torch.empty(0))  # [R + 1] int32
    query_lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()
    kept: KeptKeys | None = None
    """With it the pack goes on with sequences of earlier ones (``data.packs.lay_out_continued``), and every
    context-parallel rank has the whole of it."""

    @property
    def padding(self) -> Tensor:
        """[T] bool: positions that hold no token. They come last."""
        used = sum(self.query_lengths)
        return torch.arange(self.positions.numel(), device=self.positions.device) >= used


def window_of(config: Any, layer_number: int) -> int | None:
    """How many keys back a layer sees; None: all. ``config``: Megatron's, or its arguments."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] if windowed and config.window_size[0] >= 0 else None


class PairAttention(MegatronModule):
    """Softmax attention along an :class:`AttentionPlan`.

    Positions that no run covers (padding) yield zeros and receive no gradient.

    Attributes:
        backend: a name of ``attention_backends.BACKENDS``; None for the default of the inputs' device and precision.
    """

    backend: str | None = None

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
        self.context_group = None if pg_collection is None else pg_collection.cp
        self.window = window_of(config, layer_number)

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
        gradients backward, [C T, g, 2 d]; none where the plan keeps keys.

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
        if plan.kept is None:
            key, value = self._of_all_ranks(key, value)
        else:
            key, value = plan.kept.after(self.layer_number, key.squeeze(1)[:used], value.squeeze(1)[:used])
        keys, values = (part.index_select(0, plan.key_index) for part in (key, value))
        if used:
            layer = Layer(query.shape[2], self.softmax_scale, self.window)
            attend = BACKENDS[self.backend or default_backend(query.is_cuda, query.dtype, layer)]
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
