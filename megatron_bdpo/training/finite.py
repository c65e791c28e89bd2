"""Numbers that are not finite: each ends the run before a checkpoint can hold its consequences, with the pair's name.

    reference values   before the first step: the pairs are named, and their scores are not used
    a pair's loss      in its microbatch, before the optimizer steps: the pair is named, with its log-probs
    a gradient         on the rank that has it, before ranks add theirs, by Megatron's own check; the rank, the step and
                       its pairs are named. The norm over all ranks too
    weights            before a checkpoint is written

fp16 is the exception: Megatron's loss scaler skips a step whose gradients overflow, and counts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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


def check_reference(values: npt.NDArray[np.float64], needed: npt.NDArray[np.bool_], kind: str, names: Describe) -> None:
    """Refuse reference values, [P, 2], of which a needed one is not finite. The same on every rank.

    Raises:
        NotFiniteError: with the pairs.
    """
    broken = np.flatnonzero(needed & ~np.isfinite(values).all(axis=1))
    if len(broken):
        named = [f"{names(int(each))}: {values[each, 0]} (chosen), {values[each, 1]} (rejected)" for each in broken]
        raise NotFiniteError(
            f"the reference's {kind} log-probs of {_count(broken, 'pair')} are not finite:\n{_listed(named)}\nNo step "
            "was taken. Look at these pairs and at the reference's weights; in fp16 try --bf16. Leave the pairs out of "
            "the data if they are to blame."
        )


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
