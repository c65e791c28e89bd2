"""The adapters of experts whose linear layers are one (``--moe-grouped-gemm``): of every expert its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from torch import Tensor, nn

from megatron_bdpo.model.lora.adapter import LoraAdapter


class GroupedAdapters(nn.ModuleList):
    """A :class:`LoraAdapter` for each expert of this rank, in their order."""

    def forward(
        self, hidden: Tensor, splits: Sequence[int] | Tensor, output: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """The layer's output with the adapters'.

        Args:
            hidden: [tokens, in], those of the first expert, then those of the second, ...
            splits: tokens of each expert.
            output: [tokens, out] of the layer.
            weights: [out, in] of each expert.
        """
        sizes = splits.tolist() if isinstance(splits, Tensor) else list(splits)
        parts = zip(self, hidden.split(sizes), output.split(sizes), weights, strict=True)
        return torch.cat([adapter(*part, None) for adapter, *part in parts])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As Megatron's grouped layers have it: checkpoints stack experts, whichever rank has them."""
        rank, ranks = (
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        found: dict[str, Any] = {}
        for number, adapter in enumerate(self):
            place = (len(sharded_offsets), rank * len(self) + number, ranks * len(self))
            own = f"{prefix}{number}."
            assert isinstance(adapter, LoraAdapter)
            state = adapter.sharded_state_dict(own, (*sharded_offsets, place), metadata)
            replace_prefix_for_sharding(state, own, prefix)
            for shard in state.values():
                shard.replica_id = (*shard.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
            found |= state
        return found
