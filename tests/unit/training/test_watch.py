"""Limits, who counts as standing still, and what is said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.training import phases
from megatron_bdpo.training.phases import FACTOR, PHASES, PhaseClock, PhaseLimits
from megatron_bdpo.training.reporting import notify, status
from megatron_bdpo.training.standing import Standing, cause
from megatron_bdpo.training.watch import Watch, keeping

# Limits


def test_a_limit_follows_what_was_seen():
    limits = PhaseLimits()
    for phase in PHASES:
        first, floor = limits.of(phase, 0, 0), limits.of(phase, 0.1, 100)
        assert floor < first
        assert limits.of(phase, floor, 100) == FACTOR * floor, "a multiple of the longest"
        assert limits.of(phase, first, 1) == FACTOR * first, "also before enough was seen"


def test_limits_by_flag():
    limits = PhaseLimits.parse(["60", "step=5", "save=off"])
    assert limits.of("scoring", 1000, 100) == 60
    assert limits.of("step", 1000, 100) == 5
    assert limits.of("save", 1000, 100) == float("inf")
    assert PhaseLimits.parse(["off"]).given == dict.fromkeys(PHASES, float("inf"))


@pytest.mark.parametrize("word", ["steps=5", "step=0", "step=-1", "soon", "step=nan", "="])
def test_limits_that_cannot_be(word):
    with pytest.raises(UserError, match=f"--phase-limit {word}"):
        PhaseLimits.parse([word])


def test_first_steps_are_no_measure(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    clock = PhaseClock(now=("step", 0.0), is_warm=False)

    def beats(*gaps: float) -> None:
        for gap in gaps:
            now[0] += gap
            clock.beat()

    beats(500, 500)  # they compile
    clock.is_warm = True
    beats(400, 400)
    first = clock.limit()
    beats(50, 60, 50, 50, 50)
    assert (first, clock.limit()) == (1800, 300)


# Who stands still


def test_a_rank_that_waits_stands_still_only_if_no_rank_goes_on(monkeypatch):
    store = torch.distributed.HashStore()
    clocks = [PhaseClock(), PhaseClock()]
    watches = [Watch(clock, rank, 2, None, lambda state, why: None) for rank, clock in enumerate(clocks)]
    for watch in watches:
        watch._board.store = store
    clocks[1].is_waiting = True
    old = time.monotonic() - 100
    for clock, watch in zip(clocks, watches, strict=True):
        clock.now, watch._others_went_on = ("tokenizing", old), old
        watch._still()
    assert [watch._still() > 99 for watch in watches] == [True, True]
    clocks[0].beat()
    assert [watch._still() > 99 for watch in watches] == [False, False]
    clocks[0].now = ("tokenizing", old)
    clocks[1].is_waiting = False
    assert [watch._still() > 99 for watch in watches] == [True, True], "a rank that works is no rank that waits"


def standing(rank: int, seconds: float, *, waits: bool) -> Standing:
    return Standing(rank, "node", "step", seconds, 60, waits, "store.py:12 read")


def test_the_cause_is_who_waits_for_nobody():
    found = {0: standing(0, 70, waits=True), 1: standing(1, 61, waits=False), 2: standing(2, 80, waits=True)}
    expected = "rank 1 (node) stood still in the phase 'step' for 61 s (limit 60 s), in store.py:12 read"
    assert cause(found, 3) == expected
    assert cause(found, 4).startswith("rank 3 did not answer; in the phase 'step' the others have waited for 80 s")
    assert cause({0: found[0], 2: found[2]}, 4).startswith("ranks 1, 3 did not answer")
    everybody = {0: standing(0, 70, waits=True), 1: standing(1, 72, waits=True)}
    assert cause(everybody, 2).startswith("rank 1 (node)")


# status.json


def test_the_status_is_kept_current_until_the_job_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_bdpo.training.watch._POLL", 0.01)
    clock = phases.start_clock(PhaseLimits())

    def shown() -> dict[str, object]:
        return json.loads((tmp_path / "status.json").read_text())

    def wait_for(phase: str) -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / "status.json").exists() or shown()["phase"] != phase:
            assert time.monotonic() < deadline, phase
            time.sleep(0.01)

    status.forget_status()
    status.keep_status_in(str(tmp_path))
    with keeping(clock, status.refresh_status, lambda: None):
        wait_for("set-up")
        clock.step, clock.of = 3, 7
        with phases.phase("save"):
            wait_for("save")
            assert shown() | {"time": ""} == {
                "state": "running", "phase": "save", "step": 3, "of": 7, "reason": "", "time": ""
            }  # fmt: skip
            status.write_status("finished", str(tmp_path), step=7, of=7)
        time.sleep(0.1)
    assert shown()["state"] == "finished"
    status.forget_status()


# BDPO_NOTIFY


def test_notify_gets_what_has_happened(tmp_path, monkeypatch):
    told = tmp_path / "told"
    variables = " ".join(f"$BDPO_{name}" for name in ("STATE", "STEP", "STEPS", "CAUSE", "RUN"))
    monkeypatch.setenv("BDPO_NOTIFY", f"echo {variables} > {told}")
    notify.notify("crashed", step=2, of=5, cause="two\nlines", run="RUN")
    assert told.read_text() == "crashed 2 5 two lines RUN\n"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sleep 60", "BDPO_NOTIFY: ended after 0.2 s"),
        ("false", "BDPO_NOTIFY: exit code 1"),
        ("/nowhere/to/be/found", "No such file"),
        ("'", "unexpected EOF"),
    ],
)
def test_notify_never_fails_nor_waits_for_long(command, expected, monkeypatch, capfd):
    monkeypatch.setenv("BDPO_NOTIFY", command)
    monkeypatch.setenv("BDPO_NOTIFY_SECONDS", "0.2")
    began = time.monotonic()
    notify.notify("finished", step=1, of=1, cause="", run="")
    assert time.monotonic() - began < 10
    assert expected in capfd.readouterr().err


# Signals

PROGRAM = """
import os, signal, sys, time
from megatron_bdpo.training.stopping import listening, signal_heard
with listening():
    print("listening", flush=True)
    while True:
        time.sleep(0.05)
        if signal_heard():
            print(signal_heard(), flush=True)
            time.sleep(60)
"""


def test_the_second_ctrl_c_leaves_at_once():
    import signal

    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        deadline = threading.Timer(120, process.kill)
        deadline.start()
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGINT)  # a launcher passes on what the terminal has sent already
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        deadline.cancel()


def test_handlers_are_put_back():
    import signal

    from megatron_bdpo.training.stopping import listening, signal_heard

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with listening(signal.SIGUSR1):
        with listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal_heard() == "SIGUSR1", "what an inner one has heard, the outer one knows"
    assert signal_heard() == ""
    assert before == {number: signal.getsignal(number) for number in before}


def test_the_time_limit_asks_to_stop(monkeypatch, tmp_path):
    from megatron_bdpo.training import stopping

    stop = stopping.StopRequest([str(tmp_path / "stop")], minutes=2)
    monkeypatch.setattr(stopping, "_BEGAN", time.monotonic() - 119)
    assert stop.reason_of_rank_zero() == ""
    monkeypatch.setattr(stopping, "_BEGAN", time.monotonic() - 121)
    assert stop.reason_of_rank_zero() == "--exit-duration-in-mins 2 is over"
