"""Numbers that are not finite: each ends the run before a checkpoint can hold its consequences, with the pair's name.

    reference values   before the first step: the answers are named, and their scores are not used
    rewards            of a scoring job: the answers are named, and no file is written
    a step's shift     before the step, of losses that have one: the answers are named that it is not finite for
    a pair's loss      in its microbatch, before the optimizer steps: the pair is named, with its log-probs
    a gradient         on the rank that has it, before ranks add theirs, by Megatron's own check; the rank, the step and
                       its pairs are named. The norm over all ranks too
    weights            before a checkpoint is written

fp16 is the exception: Megatron's loss scaler skips a step whose gradients overflow, and counts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_bdpo.errors import PassingError, UserError
from megatron_bdpo.losses import AnswerLogProbs, GroupLogProbs, PairLogProbs
from megatron_bdpo.losses.bradley_terry import PairRewards
from megatron_bdpo.training.distributed import gather

#: More than these are counted, not named.
_NAMED = 4

Describe = Callable[[int], str]


class NotFiniteError(PassingError):
    """The numbers are wrong, not the flags or the data's form."""


class DivergedError(UserError):
    """The numbers are wrong, and a flag is the likely cause: another try would end the same way."""


def _not_finite(message: str, suspect: str) -> UserError:
    """The error with its way out.

    Args:
        suspect: see ``suspects.likely_cause``; without one, chance is to blame, or what the message has named.
    """
    if suspect:
        return DivergedError(f"{message} The likely cause is {suspect}")
    return NotFiniteError(f"{message} The same command with --load tries once more.")


#: What a loss is of, in words.
_NOUNS: dict[type, str] = {GroupLogProbs: "group", AnswerLogProbs: "answer"}


def check_losses(
    losses: Tensor,
    pairs: PairLogProbs | PairRewards | GroupLogProbs | AnswerLogProbs,
    ids: npt.NDArray[np.int64],
    describe: Describe,
    place: str = "",
    suspect: str = "",
) -> None:
    """Refuse a microbatch with a loss, [P], that is not finite.

    Args:
        pairs: or groups, or labelled answers.
        ids: [P] of the pairs, or of one of each group, or of each answer's.
        place: the step or evaluation.
        suspect: the flag that is the likely cause; see ``suspects.likely_cause``.

    Raises:
        NotFiniteError, DivergedError: on this rank; the others hear of it from the launcher.
    """
    if bool(torch.isfinite(losses).all()):
        return
    broken = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    named = [f"{describe(int(ids[row]))}: loss {float(losses[row].detach())}, {_values(pairs, row)}" for row in broken]
    where, noun = f"{place}: " if place else "", _NOUNS.get(type(pairs), "pair")
    raise _not_finite(
        f"{where}the loss of {_count(broken, noun)} is not finite:\n{_listed(named)}\nThe step was not taken, and "
        "the last checkpoint is good. Look at these pairs, at the weights the run began with, and at --lr.",
        suspect,
    )


def broken_gradient(
    what: str, iteration: int, ids: npt.NDArray[np.int64], describe: Describe, suspect: str = ""
) -> UserError:
    """The error that ends a run whose gradients are not finite: of all pairs of a step, for no one of them is known.

    Args:
        suspect: see :func:`check_losses`.
    """
    return _not_finite(
        f"the gradient of step {iteration} is not finite, although every loss was: {what}. Its pairs:\n"
        f"{_listed([describe(int(each)) for each in ids])}\nNothing of this step is saved, and the last checkpoint "
        "is good.",
        suspect,
    )


@contextlib.contextmanager
def gradients_named(
    iteration: int, pairs: Callable[[int], npt.NDArray[np.int64]], describe: Describe, suspect: str = ""
) -> Iterator[None]:
    """What Megatron's check of the gradients raises inside the block, on the rank that has them, as our error."""
    try:
        yield
    except RuntimeError as error:
        if "local grad norm" not in str(error):
            raise
        raise broken_gradient(str(error), iteration, pairs(iteration), describe, suspect) from error


def check_reference(
    values: npt.NDArray[np.float64],
    needed: npt.NDArray[np.bool_],
    kind: str,
    answers: npt.NDArray[np.int64],
    names: Describe,
) -> None:
    """Refuse reference values, [P, 2], of which a needed one is not finite. The same on every rank.

    Args:
        needed: [P]
        answers: [P, 2] which answers they are of; equal numbers are one answer.
        names: place among the P -> where the pair comes from.

    Raises:
        NotFiniteError: with the answers.
    """
    broken = _each_once(~np.isfinite(values) & needed[:, None], answers)
    if broken:
        named = [f"{_side(names(pair), answers[pair], side)}: {values[pair, side]}" for pair, side in broken]
        raise NotFiniteError(
            f"the reference's {kind} log-probs of {_count(broken, 'answer')} are not finite:\n{_listed(named)}\nNo "
            "step was taken. Look at these answers and at the reference's weights; in fp16 try --bf16. Leave their "
            "rows out of the data if they are to blame."
        )


def check_rewards(values: npt.NDArray[np.float64], answers: npt.NDArray[np.int64], names: Describe) -> None:
    """Refuse a reward model's rewards, [P, 2], of which one is not finite. The same on every rank.

    Args:
        answers, names: see :func:`check_reference`.

    Raises:
        NotFiniteError: with the answers.
    """
    broken = _each_once(~np.isfinite(values), answers)
    if broken:
        named = [f"{_side(names(pair), answers[pair], side)}: {values[pair, side]}" for pair, side in broken]
        raise NotFiniteError(
            f"the rewards of {_count(broken, 'answer')} are not finite:\n{_listed(named)}\nNothing is written. Look at "
            "these answers and at the reward model's weights; in fp16 try --bf16. Leave their rows out of the data if "
            "they are to blame."
        )


def check_shift(
    scores: Mapping[str, npt.NDArray[np.float64]],
    counted: npt.NDArray[np.bool_],
    answers: npt.NDArray[np.int64],
    names: Describe,
    after: Describe,
    place: str = "",
    suspect: str = "",
) -> None:
    """Refuse what would make the loss of every answer of a step not finite. The same on every rank.

    Args:
        scores: of each model, [P, 2] log-probs.
        counted: [P, 2] those that the loss reads.
        answers, names: see :func:`check_reference`.
        after: place among the P -> what to add, of the prompt that its answers were put after.
        place, suspect: see :func:`check_losses`.

    Raises:
        NotFiniteError, DivergedError: with the answers.
    """
    finite = np.logical_and.reduce([np.isfinite(values) for values in scores.values()])
    broken = _each_once(~finite & counted, answers)
    if broken:
        named = [
            f"{_side(names(pair), answers[pair], side)}{after(pair)}: "
            + ", ".join(f"{model} {values[pair, side]:.6g}" for model, values in scores.items())
            for pair, side in broken
        ]
        where = f"{place}: " if place else ""
        raise _not_finite(
            f"{where}what the losses of all answers share is not finite, for the log-probs of "
            f"{_count(broken, 'answer')}:\n{_listed(named)}\nThe step was not taken, and the last checkpoint is good. "
            "Look at these answers, at the weights the run began with, and at --lr.",
            suspect,
        )


def _each_once(broken: npt.NDArray[np.bool_], answers: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pair and side of each answer that is broken, [P, 2], where it comes first."""
    pair, side = np.nonzero(broken)
    first = np.sort(np.unique(answers[pair, side], return_index=True)[1])
    return list(zip(pair[first].tolist(), side[first].tolist(), strict=True))


def _side(pair: str, answers: npt.NDArray[np.int64], side: int) -> str:
    """A pair's name with the side that is meant; a labelled answer has one."""
    return pair if answers[0] == answers[1] else f"{pair} ({('chosen', 'rejected')[side]})"


def reject_broken_weights(model: list[Any], directory: Path) -> None:
    """Refuse to write weights that are not finite. Collective.

    Raises:
        NotFiniteError: on every rank, with the tensors' names.
    """
    own = [
        name
        for chunk in unwrap_model(model)
        for name, weight in chunk.named_parameters()
        if not bool(torch.isfinite(weight.detach()).all())
    ]
    broken = [f"rank {rank}: {name}" for rank, names in enumerate(gather(own)) for name in names]
    if broken:
        raise NotFiniteError(
            f"{directory} is not written: weights are not finite:\n{_listed(broken)}\nThe last checkpoint is good. The "
            "same command with --load goes on from it."
        )


def _values(pairs: PairLogProbs | PairRewards | GroupLogProbs | AnswerLogProbs, row: int) -> str:
    """What a loss has been made of."""
    if isinstance(pairs, AnswerLogProbs):
        values = {"policy": pairs.policy[row], "reference": None if pairs.reference is None else pairs.reference[row]}
        values["shift"] = pairs.shift
        return ", ".join(f"{name} {float(each.detach()):.6g}" for name, each in values.items() if each is not None)
    if isinstance(pairs, GroupLogProbs):
        answers = {"policy": pairs.policy, "reference": pairs.reference}
        return ", ".join(
            f"{name} {' / '.join(f'{value:.6g}' for value in values[row][pairs.present[row]].tolist())}"
            for name, values in answers.items()
            if values is not None
        )
    if isinstance(pairs, PairRewards):
        return f"rewards {float(pairs.chosen[row].detach()):.6g} / {float(pairs.rejected[row].detach()):.6g}"
    parts = {
        "policy": (pairs.policy_chosen, pairs.policy_rejected),
        "reference": (pairs.reference_chosen, pairs.reference_rejected),
    }
    return ", ".join(
        f"{name} {float(chosen[row].detach()):.6g} / {float(rejected[row].detach()):.6g}"
        for name, (chosen, rejected) in parts.items()
        if chosen is not None and rejected is not None
    )


def _count(found: Sequence[Any] | npt.NDArray[Any], what: str) -> str:
    return f"{len(found)} {what}{'s' * (len(found) != 1)}"


def _listed(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return "\n".join([*(f"  {line}" for line in lines[:_NAMED]), *more])
