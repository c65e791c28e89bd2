"""What losses of labelled answers find before a step: of which answers, after which prompts, when, and how it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bdpo.data.grouping import Grouping
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import AnswerLogProbs, Requirements
from megatron_bdpo.training.reference.passes import Groups
from megatron_bdpo.training.step_shift import StepShift, passes_of

#: A pair, two labelled answers, a group of two pairs, a pair.
LABEL = np.array([-1, 1, 0, -1, -1, -1], np.int8)
PROMPTS = np.array([0, 10, 20, 30, 30, 40])


class Left(Exception):
    """What a pause raises."""


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def shift_of(mismatched: bool) -> tuple[StepShift, list[Any]]:
    """One that finds the number of answers, and a list of what it asks: groups that are scored, what the loss reads."""
    asked: list[Any] = []
    grouping = Grouping([np.stack([PROMPTS] * 3, axis=1)])
    places = np.arange(2 * len(LABEL)).reshape(-1, 2)

    def mean(answers: AnswerLogProbs, options: Any) -> torch.Tensor:
        asked.append(answers)
        return torch.tensor(float(len(answers)))

    def scores(offset: float):
        def score(groups: Groups, pause: Any) -> np.ndarray:
            asked.append((offset, groups.ids.tolist(), set(groups.after.tolist())))
            pause()
            return offset + places[grouping.pairs_of(groups.ids)].astype(np.float64)

        return score

    job = SimpleNamespace(
        pool=SimpleNamespace(grouping=grouping, pairs=SimpleNamespace(label=LABEL, scored=places + 100)),
        fits_after_other=np.array([True, True, False, True, True]),
        held_out=SimpleNamespace(ids=np.array([4])),
        groups_of_step=lambda iteration: np.array([[0, 1], [1, 3], [2, 2]][iteration - 1]),
    )
    requirements = Requirements(reference=True, mismatched=mismatched)
    loss: Any = SimpleNamespace(requirements=requirements, options=None, spec=SimpleNamespace(step_shift=mean))
    return StepShift(job, loss, scores(0.25), scores(0.5)), asked  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mismatched", "groups", "sides"),
    [(False, [3, 2, 1, 0], [6, 7, 8, 9, 5, 2, 0, 1]), (True, [3, 1, 0], [6, 7, 8, 9, 2, 0, 1])],
    ids=["own prompts", "other prompts"],
)
def test_which_answers_the_loss_reads(mismatched, groups, sides):
    """Both of a pair, and of a labelled one the side of its label; none that does not fit after another prompt."""
    shift, asked = shift_of(mismatched)
    assert float(shift(np.array([3, 2, 1, 0]), lambda: None)) == len(sides)
    kind = PromptKind.OTHER if mismatched else PromptKind.OWN
    assert asked[:2] == [(0.25, groups, {kind}), (0.5, groups, {kind})]
    answers: AnswerLogProbs = asked[2]
    assert answers.policy.tolist() == [side + 0.25 for side in sides]
    assert answers.reference is not None and answers.reference.tolist() == [side + 0.5 for side in sides]
    assert answers.tokens.tolist() == [side + 100 for side in sides]
    assert answers.desirable.tolist() == [side % 2 == 0 for side in sides]


def test_where_nothing_fits():
    shift, asked = shift_of(mismatched=True)
    assert float(shift(np.array([2]), lambda: None)) == 0 and asked == []


@pytest.mark.parametrize("mismatched", [False, True], ids=["own prompts", "other prompts"])
def test_the_answer_that_breaks_it_is_named(mismatched):
    shift, _ = shift_of(mismatched)
    score = shift._policy
    pool: Any = shift._job.pool
    pool.answers_of = lambda groups: (None, SimpleNamespace(place=np.array([[0, 1], [2, 2], [3, 4]])))
    pool.describe_group, pool.prompts = "group {}".format, SimpleNamespace(other_group=np.array([1, 0, 1, 2, 3]))

    def broken(groups: Groups, pause: Any) -> np.ndarray:
        values = score(groups, pause)
        values[1] = np.nan
        return values

    shift._policy, shift._loss.spec.step_shift = broken, lambda answers, options: answers.policy.sum()
    step: Any = SimpleNamespace(place="step 7", suspect="", describe="pair {}".format)
    named = "pair 1, after the prompt of group 0: " if mismatched else "pair 1: "
    with pytest.raises(UserError, match=f"^step 7: .* of 1 answer:\n  {named}policy nan, reference [^,]*\n"):
        shift(np.array([0, 1, 4]), lambda: None, step)
    assert torch.isnan(shift(np.array([0, 1, 4]), lambda: None)), "refused by nobody"


def test_once_a_step_and_once_an_evaluation():
    """An evaluation comes in portions; one that is left begins anew."""
    shift, asked = shift_of(mismatched=False)
    step: Any = SimpleNamespace(shift=None, check_nan=False)
    done, told = [0], [0]

    def pause() -> None:
        if told[0]:
            raise Left

    def schedule(*, forward_only: bool) -> float:
        return float(step.shift)

    run = shift.wrap(schedule, step, lambda: done[0], pause)

    def groups_of(forward_only: bool) -> tuple[float, list[list[int]]]:
        asked.clear()
        return run(forward_only=forward_only), [each[1] for each in asked if isinstance(each, tuple)]

    once, found = groups_of, []
    for forward_only, steps_done in [(True, 0), (True, 0), (False, 0), (False, 1), (True, 2), (True, 2), (False, 2)]:
        done[0] = steps_done
        found.append(once(forward_only))
    held_out, again = (2.0, [[4], [4]]), (2.0, [])
    of_steps = [(3.0, [[0, 1]] * 2), (5.0, [[1, 3]] * 2), (2.0, [[2, 2]] * 2)]
    assert found == [held_out, again, *of_steps[:2], held_out, again, of_steps[2]]
    done[0], told[0] = 3, 1
    with pytest.raises(Left):
        run(forward_only=True)
    told[0] = 0
    assert groups_of(True) == held_out


def test_a_pass_may_be_left_between_blocks():
    """What a pass of several blocks gives is in the groups' order."""
    calls: list[Any] = []

    class Scorer:
        def blocks(self, groups: Groups) -> list[int]:
            return groups.ids.tolist()

        def __call__(self, blocks: tuple[int, ...]) -> np.ndarray:
            calls.append(blocks)
            return np.array([[each, -each] for each in blocks], np.float64)

    score = passes_of(Scorer())  # type: ignore[arg-type]
    groups = Groups.of(np.arange(1, 11), PromptKind.OWN)
    assert score(groups, lambda: calls.append("pause")).tolist() == [[each, -each] for each in range(1, 11)]
    assert calls == ["pause", (1, 2, 3, 4), "pause", (5, 6, 7, 8), "pause", (9, 10)]

    def leave() -> None:
        raise Left

    calls.clear()
    with pytest.raises(Left):
        score(groups, leave)
    assert calls == []
