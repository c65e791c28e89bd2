"""What loggers get: all metrics, or what Megatron does not send there itself; one that fails ends no run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.callbacks.scalars import Scalars, all_scalars, new_to_megatron
from tests.harness.moments import evaluation, start, steps_record

pytestmark = pytest.mark.usefixtures("alone")

QUARTILES = {"loss/imbalance_q1": 0.25, "pairs/imbalance_q1": float("nan")}
RATES = {"throughput/pairs_per_second": 4.0, "throughput/tokens_per_second": 50.0}


class Kept:
    """A logger that remembers, or fails."""

    name = "a logger"

    def __init__(self, gets_all: bool, problem: Exception | None = None) -> None:
        self.gets_all, self.problem = gets_all, problem
        self.told: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        if self.problem:
            raise self.problem
        self.told.append((values, step))

    def close(self, state: str) -> None:
        self.told.append(state)


def scalars(*loggers: Kept) -> Scalars:
    found = Scalars(lambda resumed: list(loggers))
    found.after_load(start())
    return found


def test_what_megatron_has_sent_is_not_sent_again():
    record = steps_record(3, **QUARTILES)
    assert new_to_megatron(record) == pytest.approx(RATES | QUARTILES, nan_ok=True)
    assert all_scalars(record)["loss"] == 0.5 and all_scalars(record).keys() > new_to_megatron(record).keys()
    held_out = evaluation(3, **QUARTILES)
    assert set(new_to_megatron(held_out)) == {f"{name} validation" for name in QUARTILES}
    assert all_scalars(held_out)["rewards/margins validation"] == 1.0


def test_each_gets_its_part_and_hears_of_the_end():
    megatrons, own = Kept(False), Kept(True)
    found = scalars(megatrons, own)
    found.after_record(steps_record(3))
    found.finished()
    assert megatrons.told == [(RATES, 3), "finished"]
    assert own.told == [(all_scalars(steps_record(3)), 3), "finished"]
    stopped = Kept(True)
    scalars(stopped).stopped(3, "")
    assert stopped.told == ["stopped"]


def test_one_that_fails_is_left_out(capsys):
    failing, other = Kept(True, OSError("no network")), Kept(True)
    found = scalars(failing, other)
    for iteration in (1, 2):
        found.after_record(steps_record(iteration))
    found.finished()
    assert capsys.readouterr().out == (
        "WARNING: a logger gets no more metrics, which metrics.jsonl goes on to keep: OSError: no network\n"
    )
    assert [step for _, step in other.told[:2]] == [1, 2] and failing.told == []


def test_one_that_cannot_be_begun_ends_the_run():
    def refuse(resumed: bool) -> list[Any]:
        raise UserError("--mlflow-experiment: it cannot be begun.")

    with pytest.raises(UserError, match="cannot be begun"):
        Scalars(refuse).after_load(start())


def opened(output: dict[str, str], tensorboard: bool) -> list[str]:
    """Names of the loggers that settings ask for."""
    from megatron_bdpo.training.reporting.loggers import opening
    from megatron_bdpo.training.reporting.loggers.logger import LoggedRun
    from megatron_bdpo.training.settings import OutputSettings

    writer = mock.Mock() if tensorboard else None
    with (
        mock.patch.object(opening, "get_tensorboard_writer", lambda: writer),
        mock.patch.object(opening, "get_wandb_writer", lambda: writer),
    ):
        run = LoggedRun("", {}, None, False)
        return [logger.name for logger in opening.open_loggers(OutputSettings(**output), run)]


def test_which_ones_a_run_has(ranks):
    assert ranks(1)(opened, {}, False) == [[]]
    assert ranks(1)(opened, {}, True) == [["TensorBoard", "W&B"]]
