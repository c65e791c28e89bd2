"""Checkpoints and evaluations by the clock: of one rank, for all, beside Megatron's intervals or in their place."""

from __future__ import annotations

import argparse
import os

import pytest

PATIENT = {"save_every_minutes": 30.0, "eval_every_minutes": 10.0, "save_interval": 500, "eval_interval": 500}


def due_steps(settings: dict[str, object], seconds_a_step: float, *, saving_until: int = 0) -> dict[str, list[int]]:
    """Steps of 500, after which Megatron would save and evaluate. Only rank 0's clock runs."""
    from torch import distributed as groups

    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.timetable import Timetable

    args = argparse.Namespace(**({"save": "run", "eval_iters": 1, "train_iters": 500} | settings))
    found: dict[str, list[int]] = {"save": [], "eval": []}
    args.distributed_backend, args.fake_process_group, args.distributed_timeout_minutes = "gloo", False, 1
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with distributed.process_groups(args):
        clock, is_saving = [0.0], [False]
        table = Timetable(args, lambda: is_saving[0], now=lambda: clock[0])
        for iteration in range(1, 501):
            clock[0] += seconds_a_step * (groups.get_rank() == 0)
            is_saving[0] = iteration <= saving_until
            table.after_step(iteration)
            if iteration % args.save_interval == 0:
                found["save"].append(iteration)
                table.saving()
            if args.eval_interval and iteration % args.eval_interval == 0:
                found["eval"].append(iteration)
                table.evaluated()
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


def settled(settings: dict[str, object]) -> tuple[int, int]:
    from megatron_bdpo.training.timetable import settle_intervals

    args = argparse.Namespace(save="run", eval_every_minutes=5.0, train_iters=70, **settings)
    settle_intervals(args)
    return args.save_interval, args.eval_interval


def test_without_intervals_in_steps_the_end_is_left_to_megatron(ranks):
    by_clock = {"save_interval": None, "eval_interval": 100, "given_flags": {}}
    assert ranks(1)(settled, by_clock) == [(70, 71)]
    in_steps = {"save_interval": 10, "eval_interval": 20, "given_flags": {"eval_interval": "--eval-interval"}}
    assert ranks(1)(settled, in_steps) == [(10, 20)]
