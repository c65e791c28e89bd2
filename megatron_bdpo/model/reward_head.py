"""The scalar head of a reward model, in the output layer's place: hidden states at the ends of answers -> rewards.

It is ``score`` of transformers' models for sequence classification, Linear(H, 1) without a bias. Every
tensor-parallel rank has the whole of it.

Shapes: T positions, H hidden, A answers of a pack, E of them that end on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_bdpo.model.hf.family import REWARD_HEAD

#: Its name in the model: Megatron's GPT calls its last layer so.
_IN_MODEL = "output_layer.weight"


@dataclass(frozen=True)
class AnswerEnds:
    """Where the answers of a pack end, as one context-parallel rank has it."""

    hidden: Tensor  # [E] int64, position among this rank's
    answer: Tensor  # [E] int64 in [0, A), ascending
    answers: int  # A


class RewardHead(torch.nn.Module):
    """Rewards of answers."""

    def __init__(self, config: Any, tp_group: Any) -> None:
        """
        Args:
            config: Megatron's ``TransformerConfig``.
        """
        super().__init__()
        self.tp_group, self.sequence_parallel = tp_group, config.sequence_parallel
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            config.init_method(self.weight)
        # Under sequence parallelism each rank has the gradient of its own positions: Megatron adds those up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, ends: AnswerEnds, context_group: Any) -> Tensor:
        """Hidden states of a pack, or of this rank's part, -> rewards of all its answers.

        Collectives: an all-reduce of [A] over tensor-parallel ranks under sequence parallelism, and one over
        context-parallel ranks; none backward, for every rank has the same loss and takes the gradient of its own terms.

        Args:
            hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.

        Returns:
            [A] float64, computed in float32.
        """
        own, is_own = ends.hidden, None
        if self.sequence_parallel:
            positions = hidden_states.shape[0]
            own = own - positions * self.tp_group.rank()
            is_own = (own >= 0) & (own < positions)
            own = own.clamp(0, positions - 1)  # and not a selection, for whose length the host would wait
        rewards = (hidden_states.squeeze(1).index_select(0, own).float() @ self.weight.float().T).squeeze(1)
        if is_own is not None:
            rewards = torch.where(is_own, rewards, 0.0)
        whole = rewards.new_zeros(ends.answers, dtype=torch.float64).index_put((ends.answer,), rewards.double())
        if self.sequence_parallel:
            whole = reduce_from_tensor_model_parallel_region(whole, group=self.tp_group)
        if context_group.size() > 1:
            whole = reduce_from_tensor_model_parallel_region(whole, group=context_group)
        return whole


@dataclass(frozen=True)
class RewardContext:
    """What is to be rewarded."""

    ends: AnswerEnds
    context_group: Any
    """Process group over which the pack's positions are split."""


def reward_answers(*, hidden_states: Tensor, output_layer: RewardHead, context: RewardContext, **unused: Any) -> Tensor:
    """``output_processor`` of GPTModel: see :meth:`RewardHead.forward`."""
    rewards: Tensor = output_layer(hidden_states, context.ends, context.context_group)
    return rewards


def name_head(state: dict[str, Any]) -> None:
    """Give the head a name of its own in a sharded state dict: the output layer of checkpoints is another tensor."""
    for key, shard in state.items():
        if key.endswith(_IN_MODEL):
            shard.key = REWARD_HEAD
            shard.allow_shape_mismatch = False  # which Megatron sets for the vocabulary's padding
