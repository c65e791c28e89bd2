"""Attention over packed groups: the ``core_attention`` of every layer.

The plan (built on the host, see ``data.packs``) is a list of runs: contiguous queries that attend to a gathered list
of keys under a bottom-right causal mask. Packing, shared prompts, plain sequences and context parallelism, where each
rank has the queries of its own positions and the keys of all, are the same few lines.

Shapes: T positions of this rank (the pack's length over the C context-parallel ranks), R runs, K gathered keys,
n query heads and g key/value heads of this rank, d head size of queries and keys, e of values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from megatron_bdpo.model.attention_backends import BACKENDS, default_backend
from megatron_bdpo.model.attention_layer import Layer


class KeptKeys:
    """Keys and values of passes whose sequences go on, of every layer of this rank: those of the last pass first."""

    def __init__(self) -> None:
        self._of_layer: dict[int, tuple[Tensor, Tensor]] = {}

    def after(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this pass, [used, g, d] and [used, g, e], and after them the earlier ones."""
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
    groups: Tensor = field(default_factory=lambda: torch.empty(0))  # [T] number of the group; of padding 0
    group_weight: Tensor = field(default_factory=lambda: torch.empty(0))  # [G] what each counts in the step's mean
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
        softcap: of the scores; see ``attention_layer.Layer``.
        softmax_offset: [n] sinks, as Megatron's own attention calls them; None where the layer has none.
    """

    backend: str | None = None
    softcap: float | None = None
    softmax_offset: Tensor | None

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
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        # k_channels and v_channels are those of multi-latent attention: the inputs have them.
        self.softmax_scale = (k_channels or config.kv_channels) ** -0.5 if softmax_scale is None else softmax_scale
        # Nothing to do for config.apply_query_key_layer_scaling: Megatron divides the scores by the layer's number and
        # multiplies them again within its fp32 softmax, to spare fp16 large scores; these kernels hold them in fp32.
        self.context_group = None if pg_collection is None else pg_collection.cp
        self.window = window_of(config, layer_number)
        self.tensor_group = None if pg_collection is None else pg_collection.tp
        self._make_sinks()

    def _make_sinks(self) -> None:
        """Those that Megatron's ``--softmax-type`` names: none, fixed at 0, or learned."""
        self.softmax_offset = None
        if self.config.softmax_type == "vanilla":
            return
        ranks = 1 if self.tensor_group is None else self.tensor_group.size()
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        sinks = torch.zeros(self.config.num_attention_heads // ranks, dtype=self.config.params_dtype, device=device)
        if self.config.softmax_type == "off-by-one":
            self.softmax_offset = sinks
            return
        self.softmax_offset = torch.nn.Parameter(sinks)
        # Megatron's own attention does not say so, and then gradient norms would count one rank's sinks alone.
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

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
        gradients backward, [C T, g, d + e]; none where the plan keeps keys.

        Args:
            query: [T, 1, n, d]; key: [T, 1, g, d], g divides n; value: [T, 1, g, e].
            packed_seq_params: the :class:`AttentionPlan`; every other mask argument is ignored by design, because
                the plan says all there is to say.

        Returns:
            [T, 1, n * e]
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
        layer = Layer(
            query.shape[2],
            self.softmax_scale,
            self.window,
            None if value.shape[2] == query.shape[2] else value.shape[2],
            self.softcap,
            self.softmax_offset is not None,
        )
        if used:
            attend = BACKENDS[self.backend or default_backend(query.is_cuda, query.dtype, layer)]
            out = attend(query[:used], keys, values, plan, layer, self.softmax_offset)
        else:
            # Nothing to attend, yet keys and values stay in the graph: their backward is a collective.
            nothing = query[:0].sum() + keys.sum() + values.sum()
            if self.softmax_offset is not None:
                nothing = nothing + self.softmax_offset.sum()
            out = nothing.expand(0, query.shape[1], layer.output_size)
        out = functional.pad(out.flatten(1), (0, 0, 0, query.shape[0] - used))
        return out.unsqueeze(1)

    def _of_all_ranks(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [C T, g, d] and values [C T, g, e] of the whole pack, those of context-parallel rank 0 first."""
        if self.context_group is not None and self.context_group.size() > 1:
            both = torch.cat([key, value], dim=-1)
            widths = key.shape[-1], value.shape[-1]
            key, value = gather_from_sequence_parallel_region(both, group=self.context_group).split(widths, dim=-1)
        return key.squeeze(1), value.squeeze(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Learned sinks, divided by head; nothing where there are none."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state
