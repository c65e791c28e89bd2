"""Asked to stop, by a signal to one rank or by a file: a checkpoint, one exit for all ranks, and a run that goes on."""

from __future__ import annotations

import json
import os
import signal

import pytest
from torch import distributed

from megatron_bdpo.training.callbacks.callback import Callback
from tests.distributed.test_resume import assert_bit_identical
from tests.harness.jobs import Outcome, WeightsKept, last_stage, run_job, train

LAYOUT = ["--tensor-model-parallel-size", "2", "--train-iters", "4", "--save-interval", "100"]


def train_and_ask(flags, *, at_step, rank, sends=None, touches=None):
    """Run the tiny job on this rank; after ``at_step`` steps ``rank`` signals itself, or touches a file."""

    class Asking(Callback):
        def after_load(self, start):
            self.ask_at(start.iteration)

        def after_step(self, step):
            self.ask_at(step.iteration)

        def ask_at(self, iteration):
            if iteration == at_step and distributed.get_rank() == rank:
                if sends:
                    os.kill(os.getpid(), sends)
                if touches:
                    touches.touch()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    weights = WeightsKept()
    run, exit_code = run_job(flags, {}, [Asking(), weights])
    assert handlers == {number: signal.getsignal(number) for number in handlers}, "handlers are put back"
    return Outcome(run.progress.steps, run.progress.evaluations, list(weights.shards), exit_code), run.stop.reason


def status(directory):
    return json.loads((directory / "status.json").read_text())


@pytest.mark.parametrize(
    ("how", "expected_reason"),
    [
        ({"rank": 1, "sends": signal.SIGTERM}, "SIGTERM received"),
        ({"rank": 0, "sends": signal.SIGUSR2}, "SIGUSR2 received"),
        ({"rank": 0, "touches": "stop"}, "stop is there"),
    ],
)
def test_stopped_run_resumes_bit_identically(ranks, tmp_path, how, expected_reason):
    whole, parts, stop_file = tmp_path / "whole", tmp_path / "parts", tmp_path / "stop"
    uninterrupted = ranks(2)(train, [*LAYOUT, "--save", str(whole)])
    assert status(whole)["state"] == "finished"
    if "touches" in how:
        how = how | {"touches": stop_file}
    resume = [*LAYOUT, "--save", str(parts), "--load", str(parts), "--exit-signal", "SIGUSR2"]
    watched = ["--stop-file", str(tmp_path / "other"), str(stop_file)]
    stopped = ranks(2)(train_and_ask, [*resume, *watched], at_step=2, **how)
    assert [outcome.exit_code for outcome, _ in stopped] == [0, 0]
    assert all(reason.endswith(expected_reason) for _, reason in stopped)
    assert [step["iteration"] for step in last_stage(stopped)[0].steps] == [1, 2]
    found = status(parts)
    assert (found["state"], found["step"], found["of"]) == ("stopped", 2, 4)
    assert found["reason"].endswith(expected_reason)
    assert_bit_identical(uninterrupted, ranks(2)(train, resume))
    assert status(parts)["state"] == "finished"


def test_asked_before_the_first_step(ranks, tmp_path):
    stop_file = tmp_path / "stop"
    flags = [*LAYOUT, "--save", str(tmp_path / "run"), "--stop-file", str(stop_file)]
    outcomes = [outcome for outcome, _ in ranks(2)(train_and_ask, flags, at_step=0, rank=0, touches=stop_file)]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert last_stage(outcomes).steps == []
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("stopped", 0)


def test_an_evaluation_that_was_left_is_done_when_the_run_goes_on(ranks, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*LAYOUT, "--eval-share", "0.3", "--eval-interval", "2"]

    def evaluated(run):
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [record for record in records if record["kind"] == "evaluation"]

    ranks(2)(train, [*flags, "--save", str(whole)])
    assert [record["iteration"] for record in evaluated(whole)][:2] == [2, 4]
    resume = [*flags, "--save", str(parts), "--load", str(parts)]
    ranks(2)(train_and_ask, resume, at_step=2, rank=1, sends=signal.SIGTERM)
    assert (status(parts)["step"], evaluated(parts)) == (2, [])
    ranks(2)(train, resume)
    assert evaluated(parts) == evaluated(whole)
