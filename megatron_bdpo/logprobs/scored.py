"""The positions of a pack whose next token is scored, and sums over answers, or over segments of answers.

Shapes: N scored positions, A answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredPositions:
    """Which hidden state predicts which token of which answer.

    A hidden state may come more than once: a prompt's last position predicts the first token of each of its answers.
    """

    hidden: Tensor  # [N] int64, position in the pack
    target: Tensor  # [N] int64, token id
    answer: Tensor  # [N] int64 in [0, A), non-decreasing
    answer_tokens: Tensor  # [A] int64, scored tokens of each answer on this rank
    longest: int  # largest of answer_tokens, 0 without answers; known to the host, so that no one waits for the GPU

    @classmethod
    def of(
        cls,
        hidden: npt.ArrayLike,
        target: npt.ArrayLike,
        answer_tokens: npt.ArrayLike,
        device: torch.device | str | None = None,
    ) -> ScoredPositions:
        """From arrays or lists on the host, such as those of a ``data.Pack``.

        Args:
            hidden: [N] position whose hidden state predicts the target; answer after answer.
            target: [N] token ids.
            answer_tokens: [A] how many of them belong to each answer; they sum to N.
            device: where the tensors go; the default device when None.

        Raises:
            ValueError: the lengths do not fit.
        """
        tokens = np.asarray(answer_tokens, np.int64)
        answer = np.repeat(np.arange(len(tokens)), tokens)
        index, ids = (np.asarray(array, np.int64) for array in (hidden, target))
        if not len(index) == len(ids) == len(answer):
            raise ValueError(f"{len(index)} positions, {len(ids)} targets, {len(answer)} tokens of answers")

        def on_device(array: npt.NDArray[np.int64]) -> Tensor:
            return torch.as_tensor(array, device=device)

        longest = int(tokens.max(initial=0))
        return cls(on_device(index), on_device(ids), on_device(answer), on_device(tokens), longest)


class OneRank:
    """A process group of this process alone, for what asks a group only for its rank and its size."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class TokenScores(NamedTuple):
    """What the output layer says about the scored positions, in nats."""

    log_probs: Tensor  # [N] float32, of the targets
    entropy: Tensor | None  # [N] float32, of the whole distribution, without gradient; None unless asked for
    collision_entropy: Tensor | None = None  # [N] float32, its -log sum_v p_v^2, likewise


class AnswerScores(NamedTuple):
    """Sums of those over A answers, [A] float64 each."""

    log_probs: Tensor
    entropy: Tensor | None = None
    collision_entropy: Tensor | None = None

    def stacked(self) -> Tensor:
        """[A], or [rows, A] where there is more than log-probs: pipeline schedules take one tensor."""
        rows = [each for each in self if each is not None]
        return rows[0] if len(rows) == 1 else torch.stack(rows)


def select_scored(hidden_states: Tensor, scored: ScoredPositions, *, tp_group: Any, sequence_parallel: bool) -> Tensor:
    """The hidden state of every scored position.

    Under sequence parallelism: one all-gather forward, one reduce-scatter backward. Autograd keeps neither the gathered
    hidden states nor the result.

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.

    Returns:
        [N, H].
    """
    if sequence_parallel:
        # Each rank's logits depend on all positions: the backward of this gather sums the ranks' partial gradients.
        hidden_states = megatron_parallel().gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    return hidden_states.squeeze(1).index_select(0, scored.hidden)


def answer_log_probs(token_log_probs: Tensor, scored: ScoredPositions, context_group: Any = None) -> Tensor:
    """Sum token log-probs over each answer: log pi(y|x) in nats. Entropies are summed the same way.

    Log-ratios are small differences of these large sums, so they are added and kept in fp64. The sum runs over a
    padded matrix rather than a scatter-add, whose order is not fixed on a GPU.

    Collectives: with context parallelism one all-reduce of [A] forward, none backward: every rank of the group has the
    whole sums, hence the same loss and the same gradient for its own terms.

    Args:
        token_log_probs: [N] of any floating type.
        context_group: process group over which the answers' positions are split, if they are.

    Returns:
        [A] float64, differentiable, the same on all ranks of ``context_group``. An answer without tokens sums to 0.
    """
    sums = _own_sums(token_log_probs, scored)
    if context_group is None or context_group.size() == 1:
        return sums
    return megatron_parallel().reduce_from_tensor_model_parallel_region(sums, group=context_group)


def megatron_parallel() -> Any:
    """Megatron's layers and collectives with gradients. Where one rank has all, Megatron may be absent."""
    from megatron.core import tensor_parallel

    return tensor_parallel


def _own_sums(token_log_probs: Tensor, scored: ScoredPositions) -> Tensor:
    lengths = scored.answer_tokens
    answers = lengths.numel()
    if answers == 0:
        return token_log_probs.double()  # [0]: keeps the graph, so that an empty rank still runs its backward
    starts = torch.cumsum(lengths, 0) - lengths
    offset = torch.arange(scored.answer.numel(), device=lengths.device) - starts[scored.answer]
    padded = token_log_probs.new_zeros((answers, scored.longest), dtype=torch.float64)
    return padded.index_put((scored.answer, offset), token_log_probs.double()).sum(dim=1)
