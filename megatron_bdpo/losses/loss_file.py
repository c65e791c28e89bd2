"""A loss in a plain Python file: the file is run, and its ``SPEC`` tried on two pairs, groups or answers first."""

from __future__ import annotations

import hashlib
import linecache
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.answers import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.base import AnyLossSpec, LossSpec, PairLogProbs, PairLosses, Requirements, Takes
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses
from megatron_bdpo.user_files import read_regular

FLAG = "--loss-file"

#: What a file has to define.
NAME = "SPEC"

_MOST_BYTES = 10_000_000
_MODULE = "megatron_bdpo_loss_file"


@dataclass(frozen=True)
class LossFile:
    """A file that has been run."""

    path: str
    """As it was given."""
    digest: str
    """SHA-256 of its bytes. What it imports is not part of that."""
    spec: AnyLossSpec


def read_loss_file(path: str) -> LossFile:
    """Run a file and take its ``SPEC``.

    Raises:
        UserError: it cannot be read or run, it has no ``SPEC``, or that is none; the message names file and line.
    """
    place = Path(path).expanduser()
    try:
        text = read_regular(place, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{FLAG} {path} cannot be read: {error.strerror or error}. Give a Python file.") from error
    module = _run(place, text)
    if not hasattr(module, NAME):
        raise UserError(
            f"{FLAG} {path} defines no {NAME}. Add `{NAME} = LossSpec(name=..., function=..., options=..., "
            "requirements=..., summary=..., source=...)`: docs/own-loss.md has a whole file."
        )
    spec = getattr(module, NAME)
    if not isinstance(spec, LossSpec):
        raise UserError(f"{FLAG} {path}: {NAME} is a {type(spec).__name__}. Make it a LossSpec: see docs/own-loss.md.")
    return LossFile(path, hashlib.sha256(text).hexdigest(), spec)


def _run(path: Path, text: bytes) -> ModuleType:
    """The file as a module: what has been read is what runs."""
    module = ModuleType(_MODULE)
    module.__file__ = str(path)
    before = sys.modules.get(_MODULE)
    sys.modules[_MODULE] = module  # where dataclasses look their types up
    linecache.checkcache(str(path))
    try:
        exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    except Exception as error:  # it may raise anything
        if before is None:
            del sys.modules[_MODULE]
        else:
            sys.modules[_MODULE] = before
        raise _failed(str(path), error, "cannot be run") from error
    return module


def try_loss(file: LossFile) -> None:
    """Compute the loss of two pairs, groups or labelled answers, with its default options, and look at what comes out.

    Raises:
        UserError: it is not what a step can use; the message names the file and what is wrong.
    """
    spec = file.spec
    try:
        options = spec.options()
        needs = spec.requirements(options)
        if not isinstance(needs, Requirements):
            raise UserError(_wrong(file, f"requirements returns a {type(needs).__name__}", "Return Requirements(...)."))
        kind = _KINDS[spec.takes]
        made = kind.made(needs)
        problem = _problem(spec.function(made, options), kind)
        if not problem and spec.step_targets:
            problem = _problem_with_targets(spec, made, options, kind)
        if not problem and spec.step_shift:
            problem = _problem_with_a_shift(spec, made, options, kind)
    except UserError:
        raise
    except Exception as error:  # it may raise anything
        advice = "Say in requirements what it reads beyond the policy's log-probs: the rest is None."
        raise _failed(file.path, error, f"the loss '{spec.name}' cannot be computed", advice) from error
    if problem:
        raise UserError(_wrong(file, *problem))


def _wrong(file: LossFile, what: str, advice: str) -> str:
    return f"{FLAG} {file.path}: the loss '{file.spec.name}': {what}. {advice}"


class _Kind(NamedTuple):
    """What a loss is tried on, two pairs, groups of at most three answers, or answers; and what it gives back."""

    made: Callable[[Requirements], Any]
    losses: type[PairLosses] | type[GroupLosses] | type[AnswerLosses]
    rewards: dict[str, list[int]]
    """Their shapes, by field; loss and metrics are [2]."""
    what: str
    policy: str = "policy"


def _problem(found: Any, wanted: _Kind) -> tuple[str, str] | None:
    """What is wrong with a loss's results, and what to do."""
    result, first = wanted.losses.__name__, next(iter(wanted.rewards))
    if not isinstance(found, wanted.losses):
        return f"its function returns a {type(found).__name__}", f"Return {result}(loss, {first}, ...)."
    values = {name: getattr(found, name) for name in ("loss", *wanted.rewards)}
    values |= {f"metrics['{name}']": value for name, value in found.metrics.items()}
    for name, value in values.items():
        expected = wanted.rewards.get(name, [2])
        if _shape(value) != expected:
            problem = f"{name} of two {wanted.what}s is {_shape(value)}, not {expected}"
            return problem, f"Give a value per {wanted.what}: the trainer averages."
        if name != "loss" and value.requires_grad:
            return f"{name} carries a gradient", "Detach it: it is only told."
    if not found.loss.requires_grad:
        return "its loss has no gradient", f"Compute it from {wanted.policy}, in torch."
    return None


def _problem_with_targets(spec: AnyLossSpec, pairs: PairLogProbs, options: Any, kind: _Kind) -> tuple[str, str] | None:
    """Of pairs that are those of a step, of which the loss sees what ``step_targets`` is shown in training."""
    assert spec.step_targets is not None
    seen = PairLogProbs(
        pairs.policy_chosen.detach(),
        pairs.policy_rejected.detach(),
        pairs.chosen_tokens,
        pairs.rejected_tokens,
        pairs.reference_chosen,
        pairs.reference_rejected,
    )
    targets = spec.step_targets(seen, options)
    found = [_shape(each) for each in targets] if isinstance(targets, tuple | list) else _shape(targets)
    if found != [[2], [2]]:
        return f"step_targets of two pairs is {found}, not [[2], [2]]", "Give two tensors of a value per pair each."
    chosen, rejected = targets
    return _problem(spec.function(replace(pairs, chosen_target=chosen, rejected_target=rejected), options), kind)


def _problem_with_a_shift(
    spec: AnyLossSpec, answers: AnswerLogProbs, options: Any, kind: _Kind
) -> tuple[str, str] | None:
    """Of labelled answers that are those of a step."""
    assert spec.step_shift is not None
    shift = spec.step_shift(replace(answers, policy=answers.policy.detach()), options)
    if _shape(shift) != []:
        what = f"step_shift of two answers is {_shape(shift)}, not []"
        return what, "Give one number for the step, a tensor of no dimension."
    return _problem(spec.function(replace(answers, shift=shift), options), kind)


def _shape(value: Any) -> list[int] | str:
    """Of a tensor; of anything else its type."""
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _two_pairs(needs: Requirements) -> PairLogProbs:
    """Of a policy that is its reference, as at the first step; without what is not asked for."""

    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    chosen, rejected = column(-12.0, -20.0), column(-15.0, -18.0)
    reference = (chosen, rejected) if needs.reference else (None, None)
    unconditional = (chosen - 2.0, rejected - 1.0) if needs.comprehension else (None, None)
    labels = (torch.tensor([0, 1]), torch.tensor([1, 0])) if needs.safety else (None, None)
    return PairLogProbs(
        chosen.clone().requires_grad_(),
        rejected.clone().requires_grad_(),
        torch.tensor([6, 8]),
        torch.tensor([5, 9]),
        *reference,
        *unconditional,
        *labels,
        **_beginnings(needs),
    )


def _beginnings(needs: Requirements) -> dict[str, torch.Tensor]:
    """Of the same pairs, the log-probs of their common lengths, 5 and 8 tokens."""
    if not needs.beginnings:
        return {}
    common = {"chosen": torch.tensor([-10.0, -20.0]), "rejected": torch.tensor([-15.0, -16.0])}
    models = ("policy", "reference") if needs.reference else ("policy",)
    return {
        f"{model}_{name}_beginning": value.clone().requires_grad_(model == "policy")
        for model in models
        for name, value in common.items()
    }


def _two_answers(needs: Requirements) -> AnswerLogProbs:
    """A desirable and an undesirable one, of a policy that is its reference; without what is not asked for."""
    reference = torch.tensor([-12.0, -20.0])
    return AnswerLogProbs(
        policy=reference.clone().requires_grad_(),
        tokens=torch.tensor([6, 8]),
        desirable=torch.tensor([True, False]),
        reference=reference if needs.reference else None,
    )


def _two_groups(needs: Requirements) -> GroupLogProbs:
    """Of three answers and of two, of a policy that is its reference; without what is not asked for."""
    reference = torch.tensor([[-12.0, -15.0, -20.0], [-9.0, -18.0, 0.0]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    return GroupLogProbs(
        policy=reference.clone().requires_grad_(),
        tokens=torch.tensor([[6, 5, 8], [9, 7, 1]]),
        score=torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 0.0]]),
        present=present,
        reference=reference if needs.reference else None,
        unconditional=torch.where(present, reference - 2.0, 0) if needs.comprehension else None,
        unsafe=torch.tensor([[0, 1, 0], [1, 0, 0]]) if needs.safety else None,
    )


_KINDS: dict[Takes, _Kind] = {
    "pairs": _Kind(
        _two_pairs,
        PairLosses,
        {"chosen_reward": [2], "rejected_reward": [2]},
        "pair",
        "policy_chosen and policy_rejected",
    ),
    "groups": _Kind(_two_groups, GroupLosses, {"reward": [2, 3]}, "group"),
    "answers": _Kind(_two_answers, AnswerLosses, {"reward": [2]}, "answer"),
}


def _failed(path: str, error: Exception, what: str, advice: str = "") -> UserError:
    """What the file's own code has raised, with its line in the file."""
    if isinstance(error, SyntaxError):
        line = error.lineno
        told = error.msg
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line, told = (lines[-1] if lines else None), f"{type(error).__name__}: {error}"
    where = f", line {line}" if line else ""
    return UserError(f"{FLAG} {path}{where}: {what}: {told}. {advice or 'Mend the file.'}")
