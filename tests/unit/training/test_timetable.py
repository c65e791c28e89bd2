"""Checkpoints and evaluations by the clock: of one rank, for all, beside Megatron's intervals or in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.jobs import own_process

PATIENT = {"save_every_minutes": 30.0, "eval_every_minutes": 10.0, "save_interval": 500, "eval_interval": 500}


def job(flags: dict[str, object]) -> Any:
    """Arguments of a job of 500 steps, as after Megatron's validation, with these."""
    from megatron_bdpo.training.flags.arguments import Arguments

    return Arguments.parse([], {"save": "run", "eval_iters": 1, "train_iters": 500} | flags)


def due_steps(flags: dict[str, object], seconds_a_step: float, *, saving_until: int = 0) -> dict[str, list[int]]:
    """Steps of 500, after which Megatron would save and evaluate. Only rank 0's clock runs."""
    from torch import distributed as groups

    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.callbacks.base import StepResult
    from megatron_bdpo.training.callbacks.timetable import Timetable

    arguments = job(flags)
    found: dict[str, list[int]] = {"save": [], "eval": []}
    with distributed.process_groups(own_process()):
        clock, is_saving = [0.0], [False]
        table = Timetable(arguments, lambda: is_saving[0], now=lambda: clock[0])
        for iteration in range(1, 501):
            clock[0] += seconds_a_step * (groups.get_rank() == 0)
            is_saving[0] = iteration <= saving_until
            table.after_step(StepResult(iteration, {}, skipped=False, seconds=0.0, pairs=1, tokens=1))
            due = arguments.megatron
            if iteration % due.save_interval == 0:
                found["save"].append(iteration)
                table.saving(Path())
            if due.eval_interval and iteration % due.eval_interval == 0:
                found["eval"].append(iteration)
                table.after_evaluation({}, iteration)
    return found


def test_all_ranks_save_and_evaluate_by_rank_zeros_clock(ranks):
    found = ranks(2)(due_steps, PATIENT, 10.0)
    assert found[0] == found[1] == {
        "save": [180, 360, 500],
        "eval": [60, 120, 180, 240, 300, 360, 420, 480, 500],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_every_minutes": None, "eval_every_minutes": None, "save_interval": 200}, [200, 400]),
        ({"save_interval": 200}, [180, 200, 380, 400]),  # both: each begins the clock's interval anew
        ({"save_every_minutes": 1000.0, "save_interval": 250}, [250, 500]),
    ],
)
def test_beside_an_interval_in_steps(ranks, settings, expected):
    assert ranks(1)(due_steps, PATIENT | settings, 10.0)[0]["save"] == expected


def test_none_is_due_while_one_is_being_written(ranks):
    (found,) = ranks(1)(due_steps, PATIENT, 10.0, saving_until=200)
    assert found["save"] == [201, 381, 500]


def intervals(flags: list[str]) -> dict[str, int]:
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.flags.validation import intervals

    arguments = Arguments.parse(["--save", "run", "--eval-every-minutes", "5", *flags])
    return intervals(arguments.settings, last_step=70)


def test_without_intervals_in_steps_the_end_is_left_to_megatron(ranks):
    assert ranks(1)(intervals, []) == [{"save_interval": 70, "eval_interval": 71}]
    assert ranks(1)(intervals, ["--save-interval", "10", "--eval-interval", "20"]) == [{}]
