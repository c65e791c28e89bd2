"""The forward step of a reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron_bdpo.losses import PairLosses
from megatron_bdpo.losses.bradley_terry import PairRewards
from megatron_bdpo.model.reward_head import RewardContext, reward_answers
from megatron_bdpo.training.batches import PackBatch
from megatron_bdpo.training.forward import LossInputs, PreferenceStep, reward_metrics


def reward_pack(model: Any, batch: PackBatch) -> Tensor:
    """Run one pipeline stage on a pack: on the last one rewards [A] float64 of its answers, else hidden states.

    Context-parallel ranks each run their part of the pack and all get the rewards of all its answers.
    """
    return model(
        input_ids=batch.tokens,
        position_ids=batch.attention.positions[None],
        attention_mask=None,
        packed_seq_params=batch.attention,
        output_processor=reward_answers,
        output_processor_context=RewardContext(batch.ends, parallel_state.get_context_parallel_group()),
    )


def rewards_of(batch: PackBatch, rewards: Tensor) -> PairRewards:
    """What the loss reads of a batch, from the rewards [A] of its answers."""
    chosen, rejected = rewards[batch.pairs.answers].unbind(1)
    return PairRewards(chosen, rejected, batch.pairs.margin)


class RewardStep(PreferenceStep):
    """``forward_step`` of a reward model's run. It has no reference and scores no tokens."""

    def _scores(self, model: Any, batch: PackBatch) -> Tensor:
        return reward_pack(model, batch)

    def _inputs(self, batch: PackBatch, scores: Tensor) -> LossInputs:
        return LossInputs(rewards_of(batch, scores), batch.pairs.weight, batch.pairs.ids)

    def _metrics(self, pairs: PairRewards, losses: PairLosses) -> dict[str, Tensor]:
        return reward_metrics(losses)


class RewardScoringStep:
    """``forward_step`` of a pass that collects the rewards [P, 2] of each pack's pairs."""

    def __call__(self, data_iterator: Iterator[PackBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(data_iterator).to_device()

        def collect(rewards: Tensor, non_loss_data: bool = True) -> Tensor:
            return rewards.detach()[batch.pairs.answers]

        return reward_pack(model, batch), collect
