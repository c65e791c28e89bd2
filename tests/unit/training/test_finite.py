"""What is said of numbers that are not finite: each answer once, with its row. Jobs: reliability/test_numbers.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.finite import check_reference, check_shift

#: A pair; a labelled answer, which is a pair of itself; three pairs of three answers.
ANSWERS = np.array([[0, 1], [2, 2], [3, 4], [3, 5], [4, 5]])
ALL = np.ones(5, bool)

#: Broken sides -> what is named, in this order.
NAMED = {
    "a side of a pair": ([(0, 1)], ["row 0 (rejected)"]),
    "both sides": ([(0, 0), (0, 1)], ["row 0 (chosen)", "row 0 (rejected)"]),
    "a labelled answer": ([(1, 0), (1, 1)], ["row 1"]),
    "one of several pairs": ([(2, 1), (4, 0)], ["row 2 (rejected)"]),
    "two of several pairs": ([(2, 0), (3, 0), (3, 1), (4, 1)], ["row 2 (chosen)", "row 3 (rejected)"]),
}


def broken_at(sides: list[tuple[int, int]], value: float) -> np.ndarray:
    values = -np.arange(10.0).reshape(5, 2)
    for side in sides:
        values[side] = value
    return values


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", NAMED)
def test_each_answer_of_a_reference_is_named_once(case, value):
    sides, named = NAMED[case]
    expected = f"the reference's conditional log-probs of {len(named)} answer{'s' * (len(named) > 1)} are not finite:"
    lines = [f"  {each}: {value}" for each in named]
    with pytest.raises(UserError) as told:
        check_reference(broken_at(sides, value), ALL, "conditional", ANSWERS, "row {}".format)
    assert str(told.value).splitlines()[: 1 + len(lines)] == [expected, *lines]
    assert str(told.value).splitlines()[1 + len(lines)].startswith("No step was taken.")


def test_what_is_not_needed_may_be_anything():
    values = broken_at([(2, 0), (3, 0)], math.nan)
    check_reference(values, np.array([True, True, False, False, True]), "conditional", ANSWERS, "row {}".format)


@pytest.mark.parametrize("model", ["policy", "reference"])
@pytest.mark.parametrize("case", NAMED)
def test_each_answer_of_a_step_is_named_once(case, model):
    sides, named = NAMED[case]
    scores = {each: broken_at(sides if each == model else [], math.nan) for each in ("policy", "reference")}
    counted = np.ones((5, 2), bool)
    counted[1, 1] = False  # of a labelled answer one side is read
    with pytest.raises(UserError) as told:
        check_shift(scores, counted, ANSWERS, "row {}".format, ", again".format, "step 3", "--lr 5. Lower it.")
    first, *lines = str(told.value).splitlines()
    assert first.startswith("step 3: ") and first.endswith(f"log-probs of {len(named)} answer{'s' * (len(named) > 1)}:")
    assert [line.split(": ")[0] for line in lines[: len(named)]] == [f"  {each}, again" for each in named]
    assert all(f"{model} nan" in line and line.count("nan") == 1 for line in lines[: len(named)])
    assert lines[len(named)].endswith("The likely cause is --lr 5. Lower it.")


def test_what_the_loss_does_not_read_breaks_nothing():
    counted = np.ones((5, 2), bool)
    counted[0, 1] = False
    check_shift({"policy": broken_at([(0, 1)], math.nan)}, counted, ANSWERS, "row {}".format, "".format)
