"""The forward step and the loss, in the shape Megatron's schedules expect.

Normalisation: ``loss_func`` returns the *sum* of the weighted pair losses and of the weights, a whole number. With
``calculate_per_token_loss`` the schedule divides the summed gradients once by the number all-reduced over data-parallel
ranks and microbatches, so a step is the exact mean over its groups of the mean over a group's pairs, or over all its
pairs, however they are packed (see ``batches.PackPairs``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.losses import LossFunction, PairLogProbs, PairLosses
from megatron_bdpo.losses.wins import wins
from megatron_bdpo.model.attention import KeptKeys
from megatron_bdpo.model.evaluation import evaluating, weights_at_rest
from megatron_bdpo.model.pair_gpt import NextTokenContext, ScoringContext, next_tokens, score_answers
from megatron_bdpo.training.batches import IntArray, PackBatch
from megatron_bdpo.training.finite import check_losses
from megatron_bdpo.training.phases import beat
from megatron_bdpo.training.reporting.quartiles import IMBALANCE, quartile_report
from megatron_bdpo.training.step_zero import StepZeroGate

Report = dict[str, Tensor]
"""Metric name -> [sum, count], which Megatron adds over microbatches and data-parallel ranks."""


class ReferenceLogProbs(NamedTuple):
    """Of a batch's pairs, each [P, 2] float64 of chosen and rejected, or None if not needed."""

    conditional: Tensor | None = None
    unconditional: Tensor | None = None
    """After the empty prompt."""
    beginnings: Tensor | None = None
    """The conditional ones of the pairs' common lengths."""


class ReferenceValues(Protocol):
    """Where a batch's reference log-probs come from."""

    def lookup(self, batch: PackBatch) -> ReferenceLogProbs: ...


class StepTargets(Protocol):
    """What the losses of a batch's pairs hang on beside the pairs: ``LossSpec.step_targets``, of the whole step."""

    def lookup(self, batch: PackBatch) -> tuple[Tensor, Tensor]:
        """[P] each, on the device, in a training step."""


def score_pack(model: Any, batch: PackBatch, scoring: TokenScoring) -> Tensor:
    """Run one pipeline stage on a pack: see ``score_answers`` on the last stage, hidden states on the others.

    Context-parallel ranks each run their part of the pack and all get the log-probs of its whole answers.
    """
    return model(
        input_ids=batch.tokens,
        position_ids=batch.attention.positions[None],
        attention_mask=None,
        packed_seq_params=batch.attention,
        output_processor=score_answers,
        output_processor_context=ScoringContext(batch.scored, scoring, parallel_state.get_context_parallel_group()),
    )


def pairs_of(
    batch: PackBatch,
    policy: Tensor,
    reference: Tensor | None,
    unconditional: Tensor | None,
    collision_entropy: Tensor | None = None,
    policy_beginnings: Tensor | None = None,
    reference_beginnings: Tensor | None = None,
) -> PairLogProbs:
    """What the loss reads of a batch.

    Args:
        policy: [A] log-probs of the batch's answers.
        reference, unconditional: [P, 2] of its pairs, or None.
        collision_entropy: [P, 2] the policy's, or None.
        policy_beginnings, reference_beginnings: [P, 2] log-probs of the pairs' common lengths, or None.
    """
    answers = batch.pairs.answers
    return PairLogProbs.of_pairs(
        batch.answer_tokens[answers],
        policy[answers],
        reference,
        unconditional,
        batch.pairs.unsafe,
        collision_entropy,
        policy_beginnings,
        reference_beginnings,
    )


class LossInputs(NamedTuple):
    """What a batch's N losses are of: its pairs, its groups or its labelled answers."""

    read: Any
    """As the loss takes them."""
    weight: Tensor
    """[N] float64, of each in the step's mean."""
    ids: IntArray
    """[N] on the host: the pair, or one of the pairs, that messages name each by."""
    entropy: Tensor | None = None
    """[A] of the policy's answers, where it is logged."""


@dataclass
class PreferenceStep:
    """``forward_step`` of a preference run. Its loss takes pairs; of what else a loss takes there are subclasses, with
    inputs, rewards and metrics of their own."""

    loss: LossFunction
    reference: ReferenceValues
    scoring: TokenScoring
    check_nan: bool = True
    describe: Callable[[int], str] = "pair {}".format
    """A pair's name for messages, by its id."""
    suspect: str = ""
    """The flag that is the likely cause of numbers that are not finite, for messages: ``suspects.likely_cause``."""
    place: str = ""
    """The step or evaluation that it is called in, for messages."""
    evaluates: bool = False
    """It is called in an evaluation."""
    observe: Callable[[IntArray, Tensor], None] | None = None
    """Told the ids of an evaluation's pairs and the rewards [P, 2] of chosen and rejected, pack by pack, on the last
    pipeline stage."""
    gate: StepZeroGate | None = None
    """During the first step: told how far each loss is from its value at policy == reference."""
    targets: StepTargets | None = None
    """Where the loss looks at whole steps."""
    imbalance_edges: Tensor | None = None
    """[3] on the device, between the quartiles of the training pairs' imbalance; None: not known beforehand."""

    def __call__(self, data_iterator: Iterator[PackBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        beat()
        batch = next(data_iterator).to_device()
        return self._scores(model, batch), partial(self._loss_func, batch)

    def _scores(self, model: Any, batch: PackBatch) -> Tensor:
        return score_pack(model, batch, self.scoring)

    def _loss_func(self, batch: PackBatch, scores: Tensor) -> tuple[Tensor, Tensor, Report]:
        inputs, count = self._inputs(batch, scores), batch.pairs.count
        losses = self.loss(inputs.read)
        loss_sum = (losses.loss * inputs.weight.to(losses.loss.dtype)).sum().float()
        if self.check_nan:
            check_losses(losses.loss, inputs.read, inputs.ids, self.describe, self.place, self.suspect)
        if self.gate is not None:
            self.gate.observe(inputs.read, self.loss)
        if self.observe is not None and self.evaluates:
            self.observe(batch.pairs.ids, self._rewards(batch, losses))
        metrics = {"loss": losses.loss, **self._metrics(inputs.read, losses)}
        report = report_of(metrics | losses.metrics, inputs.weight, count)
        if self.imbalance_edges is not None:
            main = {name: metrics[name] for name in ("loss", "rewards/accuracies", "rewards/margins")}
            report |= quartile_report(main, losses.metrics[IMBALANCE], self.imbalance_edges, inputs.weight, count)
        report |= self._side_metrics(batch, inputs, losses)
        return loss_sum, counted_here(batch, loss_sum.device), report

    def _inputs(self, batch: PackBatch, scores: Tensor) -> LossInputs:
        scored, reference = self.scoring.apart(scores), self.reference.lookup(batch)
        policy, entropy, collision_entropy = (None if each is None else batch.over_answers(each) for each in scored)
        assert policy is not None
        if collision_entropy is not None:
            collision_entropy = collision_entropy.detach()[batch.pairs.answers]
        pairs = pairs_of(
            batch,
            policy,
            reference.conditional,
            reference.unconditional,
            collision_entropy,
            batch.over_beginnings(scored.log_probs),
            reference.beginnings,
        )
        if self.targets is not None and not self.evaluates:
            chosen, rejected = self.targets.lookup(batch)
            pairs = dataclasses.replace(pairs, chosen_target=chosen, rejected_target=rejected)
        return LossInputs(pairs, batch.pairs.weight, batch.pairs.ids, entropy)

    def _rewards(self, batch: PackBatch, losses: Any) -> Tensor:
        """[P, 2] of chosen and rejected."""
        rewards: Tensor = losses.rewards
        return rewards

    def _metrics(self, read: Any, losses: Any) -> dict[str, Tensor]:
        """[N] each, beside the loss and what its function tells, with TRL's names where TRL has them."""
        return reward_metrics(losses) | {"logps/chosen": read.policy_chosen, "logps/rejected": read.policy_rejected}

    def _side_metrics(self, batch: PackBatch, inputs: LossInputs, losses: Any) -> Report:
        """What is told of chosen and of rejected answers each by themselves."""
        if inputs.entropy is None:
            return {}
        answers = batch.pairs.answers
        return entropy_report(inputs.entropy[answers], batch.answer_tokens[answers])


def counted_here(batch: PackBatch, device: torch.device) -> Tensor:
    """The sum of a batch's weights. Megatron adds those of all data- and context-parallel ranks; the ranks of one
    context have the same pairs."""
    count = batch.pairs.count if parallel_state.get_context_parallel_rank() == 0 else 0
    return torch.full((), count, dtype=torch.int, device=device)


def reward_metrics(losses: PairLosses) -> dict[str, Tensor]:
    """What the rewards of pairs are told by, [P] each."""
    margin = losses.chosen_reward - losses.rejected_reward
    return {
        "rewards/accuracies": wins(margin),
        "rewards/margins": margin,
        "rewards/chosen": losses.chosen_reward,
        "rewards/rejected": losses.rejected_reward,
    }


def entropy_report(entropy: Tensor, tokens: Tensor) -> Report:
    """The policy's entropy per scored token, in nats.

    Args:
        entropy: [P, 2] sums over chosen and rejected answers.
        tokens: [P, 2] of these.
    """
    sums = torch.stack([entropy.detach().sum(dim=0), tokens.sum(dim=0)], dim=1).float()
    return dict(zip(("entropy/chosen", "entropy/rejected"), sums, strict=True))


def report_of(values: Mapping[str, Tensor], weight: Tensor, count: int) -> Report:
    """Values [N] each, weighted with ``weight`` [N]; added up together, and ``count``, the sum of the weights, filled
    in on the device: nothing waits for the host."""
    sums = (torch.stack([value.detach().double() for value in values.values()]) * weight).sum(dim=1)
    return dict(zip(values, torch.stack([sums, torch.full_like(sums, count)], dim=1).float(), strict=True))


@dataclass
class ScoringStep:
    """``forward_step`` of a scoring pass: collects the log-probs [P, 2] of each pack's pairs."""

    scoring: TokenScoring
    with_beginnings: bool = False
    """[P, 4]: those of the pairs' common lengths behind the others, of packs whose answers are cut."""

    def __call__(self, data_iterator: Iterator[PackBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(data_iterator).to_device()

        def collect(log_probs: Tensor, non_loss_data: bool = True) -> Tensor:
            found = batch.over_answers(log_probs.detach())[batch.pairs.answers]
            beginnings = batch.over_beginnings(log_probs.detach()) if self.with_beginnings else None
            return found if beginnings is None else torch.cat([found, beginnings], dim=1)

        return score_pack(model, batch, self.scoring), collect


@dataclass
class NextTokenStep:
    """``forward_step`` of generation: the token that follows each sequence of a pack (``collect_non_loss_data``)."""

    vocab_size: int

    def __call__(
        self, data_iterator: Iterator[tuple[PackBatch, KeptKeys]], model: Any
    ) -> tuple[Tensor, Callable[..., Any]]:
        batch, kept = next(data_iterator)
        tokens = model(
            input_ids=batch.tokens,
            position_ids=batch.attention.positions[None],
            attention_mask=None,
            packed_seq_params=dataclasses.replace(batch.attention, kept=kept),
            output_processor=next_tokens,
            output_processor_context=NextTokenContext(batch.scored, self.vocab_size),
        )
        return tokens, _collect


def _collect(found: Tensor, non_loss_data: bool = True) -> Tensor:
    return found.detach()


def looking_ahead(
    schedule: Callable[..., Any], look: Callable[[list[list[PackBatch]]], list[Iterator[PackBatch]]]
) -> Callable[..., Any]:
    """A schedule whose microbatches are looked at before it runs.

    What looks may run the model over them, in a schedule of its own: started inside a forward step that would
    dead-lock pipeline stages.

    Args:
        look: gets the microbatches of each chunk, and returns what the schedule is to go through.
    """

    def run(*args: Any, data_iterator: Any, num_microbatches: int, **kwargs: Any) -> Any:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        again = look([[next(iterator) for _ in range(num_microbatches)] for iterator in iterators])
        data_iterator = again if isinstance(data_iterator, list) else again[0]
        return schedule(*args, data_iterator=data_iterator, num_microbatches=num_microbatches, **kwargs)

    return run


@torch.no_grad()
def forward_only(
    model: list[Any], step: Callable[..., Any], iterators: list[Iterator[Any]], count: int, length: int
) -> list[Tensor]:
    """Run ``count`` microbatches forward only, outside of training. Collective over the model's ranks.

    Args:
        model: this rank's chunks; DDP is stepped around, its hooks are for training.
        step: a forward step that collects.
        iterators: what it reads from, one per chunk.
        length: positions of every pack.

    Returns:
        On the last pipeline stage: what the step has collected, per microbatch. Elsewhere: an empty list.
    """
    chunks = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in model]
    schedule = get_forward_backward_func()
    with evaluating(chunks), weights_at_rest(model):
        found: list[Tensor] = schedule(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found
