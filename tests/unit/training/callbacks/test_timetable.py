"""Checkpoints and evaluations by the clock: of one rank, for all, beside Megatron's intervals or in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed

from megatron_bdpo.training.callbacks.timetable import Interval, Timetable
from megatron_bdpo.training.distributed import process_groups
from tests.harness.jobs import own_process
from tests.harness.moments import step
from tests.harness.ranks import RankFailure


def due_steps(
    save: tuple[int, float | None], evaluation: tuple[int, float | None], *, saving_until: int = 0
) -> dict[str, list[int]]:
    """Steps of 500, of ten seconds each, after which Megatron would save and evaluate. Only rank 0's clock runs.

    Args:
        save, evaluation: their intervals in steps and in minutes.
    """
    found: dict[str, list[int]] = {"save": [], "eval": []}
    told = {"save_interval": save[0], "eval_interval": evaluation[0]}
    clock, is_saving = [0.0], [False]
    with process_groups(own_process()):
        table = Timetable(
            Interval("save_interval", *save),
            Interval("eval_interval", *evaluation),
            500,
            set_arguments=told.update,
            is_writing=lambda: is_saving[0],
            now=lambda: clock[0],
        )
        for iteration in range(1, 501):
            clock[0] += 10.0 * (distributed.get_rank() == 0)
            is_saving[0] = iteration <= saving_until
            table.after_step(step(iteration))
            if iteration % told["save_interval"] == 0:
                found["save"].append(iteration)
                table.saving(Path())
            if iteration % told["eval_interval"] == 0:
                found["eval"].append(iteration)
                table.after_evaluation({}, iteration)
    return found


def test_all_ranks_save_and_evaluate_by_rank_zeros_clock(ranks):
    found = ranks(2)(due_steps, (500, 30.0), (500, 10.0))
    assert found[0] == found[1] == {
        "save": [180, 360, 500],
        "eval": [60, 120, 180, 240, 300, 360, 420, 480, 500],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("save", "evaluation", "expected"),
    [
        ((200, None), (500, None), [200, 400]),
        ((200, 30.0), (500, 10.0), [180, 200, 380, 400]),  # both: each begins the clock's interval anew
        ((250, 1000.0), (500, 10.0), [250, 500]),
    ],
)
def test_beside_an_interval_in_steps(ranks, save, evaluation, expected):
    assert ranks(1)(due_steps, save, evaluation)[0]["save"] == expected


def test_none_is_due_while_one_is_being_written(ranks):
    (found,) = ranks(1)(due_steps, (500, 30.0), (500, 10.0), saving_until=200)
    assert found["save"] == [201, 381, 500]


def intervals(flags: list[str]) -> dict[str, int]:
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.flags.validation import intervals

    arguments = Arguments.parse(["--save", "run", "--eval-every-minutes", "5", *flags])
    return intervals(arguments.settings, last_step=70)


def test_without_intervals_in_steps_the_end_is_left_to_megatron(ranks):
    assert ranks(1)(intervals, []) == [{"save_interval": 70, "eval_interval": 71}]
    assert ranks(1)(intervals, ["--save-interval", "10", "--eval-interval", "20"]) == [{}]


def minutes(texts: list[str]) -> list[float | None]:
    from megatron_bdpo.training.flags.arguments import Arguments

    return [Arguments.parse([f"--save-every={text}"]).settings.checkpoints.save_every_minutes for text in texts]


def test_units(ranks):
    assert ranks(1)(minutes, ["90s", "20m", "1.5h", "30"]) == [[1.5, 20.0, 90.0, 30.0]]


@pytest.mark.parametrize("text", ["-1m", "m", "20d", "nan", "infh"])
def test_what_is_no_time(ranks, text):
    with pytest.raises(RankFailure, match="argument --save-every/--save-every-minutes: invalid minutes value"):
        ranks(1)(minutes, [text])
