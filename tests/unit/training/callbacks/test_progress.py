"""Means over the updates of an interval, rates over all of its steps."""

from __future__ import annotations

import pytest
import torch

from megatron_bdpo.training.callbacks.callback import Callback, Record
from megatron_bdpo.training.callbacks.progress import LogInterval, Progress
from tests.harness.moments import step


class Listener(Callback):
    def __init__(self) -> None:
        self.heard: list[Record] = []

    def after_record(self, record: Record) -> None:
        self.heard.append(record)


def progress(interval: int, last_step: int) -> tuple[Progress, list[Record]]:
    found, listener = Progress(LogInterval(interval, last_step)), Listener()
    found.listeners = [listener]
    return found, listener.heard


def test_means_and_rates_of_an_interval():
    found, heard = progress(2, 10)
    found.after_step(step(1, seconds=1.0, loss=1.0, scale=0.5))
    assert heard == []
    found.after_step(step(2, seconds=3.0, loss=2.0, scale=0.75))
    expected_rates = {"throughput/pairs_per_second": 4.0, "throughput/tokens_per_second": 50.0}
    assert heard == [Record("step", 2, {"loss": 1.5, "scale": 0.625}, expected_rates)]
    assert found.steps == [{"iteration": 2.0, "loss": 1.5, "scale": 0.625} | expected_rates]


def test_a_skipped_step_takes_time_and_has_no_metrics():
    found, heard = progress(2, 10)
    found.after_step(step(1, skipped=True, seconds=3.0, loss=float("nan")))
    found.after_step(step(2, loss=2.0))
    assert heard[0].metrics == {"loss": 2.0}
    assert heard[0].rates["throughput/pairs_per_second"] == 4.0
    for iteration in (3, 4):
        found.after_step(step(iteration, skipped=True, loss=1.0))
    assert len(heard) == 1


def test_the_last_step_ends_an_interval_and_intervals_share_nothing():
    found, _ = progress(2, 5)
    for iteration in range(1, 6):
        found.after_step(step(iteration, loss=float(iteration)))
    assert [(each["iteration"], each["loss"]) for each in found.steps] == [(2, 1.5), (4, 3.5), (5, 5.0)]


def test_a_rank_without_metrics_has_no_records():
    found, heard = progress(1, 1)
    found.after_step(step(1))
    found.after_evaluation({}, 1)
    assert heard == found.steps == found.evaluations == []


def test_an_evaluation_and_its_quartiles():
    found, heard = progress(1, 1)
    means = {"loss": 0.5, "_pairs/imbalance_q1": 0.25, "_loss/imbalance_q1": 0.2}
    found.after_evaluation({name: torch.tensor(value) for name, value in means.items()}, 7)
    expected = {"loss": 0.5, "pairs/imbalance_q1": 0.25, "loss/imbalance_q1": pytest.approx(0.8)}
    assert heard == [Record("evaluation", 7, expected)]
    assert found.evaluations == [{"iteration": 7.0} | expected]
