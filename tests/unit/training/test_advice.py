"""Advice comes when it is due, once, and not to runs that are well."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.step_plan import StepPlan
from megatron_bdpo.training.reporting.advice import WINDOW, Advisor, about_data

WELL = {"rewards/chosen": 0.4, "rewards/accuracies": 0.7, "rewards/margins": 1.2, "scale": 0.98}

ILL = {
    "less likely than its reference": {"rewards/chosen": -1.5},
    "nothing is learned": {"rewards/accuracies": 0.51, "rewards/margins": 0.01},
    "learned by heart": {"rewards/margins": 25.0},
    "leave out one answer": {"scale": 0.75},
}


def advice_of(records: list[dict[str, float]], *, reads_reference: bool = True) -> list[tuple[int, str]]:
    advisor = Advisor(reads_reference)
    return [(index, text) for index, record in enumerate(records, 1) for text in advisor.observe(record)]


@pytest.mark.parametrize("expected", ILL)
def test_given_once_after_a_while_with_a_flag(expected):
    ((when, text),) = advice_of([WELL | ILL[expected]] * 5 * WINDOW)
    assert expected in text and "--" in text
    assert when >= WINDOW


def test_healthy_runs_hear_nothing():
    assert advice_of([WELL] * 5 * WINDOW) == []
    start = {"rewards/chosen": 0.0, "rewards/accuracies": 0.5, "rewards/margins": 0.0, "scale": 1.0}
    assert advice_of([start] * WINDOW + [WELL] * 2 * WINDOW) == [], "every run starts at its reference"


def test_a_bad_moment_is_not_enough():
    records = [WELL] * WINDOW + [WELL | {"rewards/chosen": -5.0}] + [WELL] * WINDOW
    assert advice_of(records) == []


def test_rewards_without_a_reference_are_no_log_ratios():
    """SimPO's reward is a log-prob per token, below zero from the start."""
    assert advice_of([WELL | {"rewards/chosen": -3.0}] * 2 * WINDOW, reads_reference=False) == []


def plan_with(fill: float) -> StepPlan:
    steps = np.zeros((1, 1), np.int64)
    return StepPlan(steps, steps, np.array([[100]]), 1, np.array([100 * fill]))


def test_about_data():
    report = DataReport(sources=["a"], rows_read=[10], pairs_kept=[10])
    assert list(about_data(report, plan_with(0.95))) == []
    report.truncated_prompts, report.truncated_responses = 6, 11
    found = list(about_data(report, plan_with(0.5)))
    assert [line.split()[0] for line in found] == ["60%", "55%", "50%"]
    assert all("--" in line for line in found)
