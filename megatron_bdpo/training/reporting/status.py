"""What has become of a run, in one small file for scripts: ``status.json`` in the directory of ``--save``.

The exit code alone does not say it: Megatron leaves its loop early with 0, and a launcher turns every failure into 1.
While a job runs, a thread of rank 0 keeps the file current (``watch``); nobody else writes it, but the rank that tells
of a hang in which rank 0 does not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.training.failing import is_first_of_launcher
from megatron_bdpo.training.phases import clock

#: Names another file, also for what goes wrong before the flags are understood.
ENVIRONMENT = "BDPO_STATUS_FILE"

State = Literal["running", "stopped", "finished", "refused", "hung"]


@dataclass
class _Known:
    """What this process has written."""

    place: str | None = None
    """File of the job that is running, where the environment names none."""
    end: tuple[State, str] | None = None
    """How the job has ended, and why."""


_known = _Known()
_one_at_a_time = threading.Lock()


def keep_status_in(save: str | None) -> None:
    """From now on the job's status is in this directory. Called once it is known that it can be written."""
    _known.place = str(Path(save) / "status.json") if save else None


def forget_status() -> None:
    """A job begins, or is over."""
    _known.place, _known.end = None, None


def end_of_job() -> tuple[State, str] | None:
    """How the job has ended and why, as far as this process has said it."""
    return _known.end


def run_directory() -> str:
    """Of the job's status, where --save is kept one; else empty."""
    return str(Path(_known.place).parent) if _known.place else ""


def write_status(
    state: State, save: str | None, *, step: int = 0, of: int = 0, reason: str = "", by_any_rank: bool = False
) -> None:
    """Replace the file, from rank 0, in one piece; nothing where neither ``--save`` nor the environment names one.

    Args:
        state: ``running``, so also after a crash; ``stopped`` early, to be resumed; ``finished``, exports and all;
            ``refused``: flags or data cannot be used, so trying again is in vain; ``hung``: a rank has stood still, and
            all were ended.
        save: the directory of ``--save``; None: that of the job that is running, if it has begun to keep one.
        step: the last optimizer step done; ``of`` so many.
        by_any_rank: also from another rank than the first.
    """
    if not (by_any_rank or is_first_of_launcher()):
        return
    with _one_at_a_time:
        if state != "running":
            _known.end = state, reason
        _write(state, str(Path(save) / "status.json") if save else _known.place, step, of, reason, time.time())


def refresh_status() -> None:
    """From the thread of rank 0 that keeps the file: where the job is, and when it has last gone on."""
    with _one_at_a_time, contextlib.suppress(OSError):  # a full disk is told by who writes what matters
        if _known.end is None:
            own, now = clock(), time.time()
            _write("running", _known.place, own.step, own.of, "", now - (time.monotonic() - own.now[1]))


def _write(state: State, place: str | None, step: int, of: int, reason: str, when: float) -> None:
    name = os.environ.get(ENVIRONMENT) or place
    if not name:
        return
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = time.strftime("%FT%T%z", time.localtime(when))
    content = {"state": state, "phase": clock().now[0], "step": step, "of": of, "reason": reason, "time": told}
    write_whole(path, json.dumps(content) + "\n")
