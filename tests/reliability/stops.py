"""A job that is asked to stop in the middle of each phase: ``python -m tests.reliability.stops``.

One unit of work of the phase is made to take UNIT seconds, or for ever where nothing is lost by leaving. Every way of
asking has its turn. Prints a line for each: seconds from the asking to the end, units that ranks have begun meanwhile,
the exit code, what status.json says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.killing import JobTree
from tests.harness.phases import PhaseBoard
from tests.reliability.kill_matrix import _made_model, ranks_of
from tests.reliability.killed_job import RANKS, Run

UNIT = 2.0

#: Phase -> how it is asked to stop.
CASES = {
    "set-up": "SIGTERM to rank 1",
    "tokenizing": "SIGINT to all",
    "weights": "SIGTERM to rank 0",
    "weights, stuck": "SIGINT to rank 0",
    "scoring": "a stop file",
    "evaluation": "SIGTERM to all",
    "export": "SIGINT to rank 1",
}


@dataclass(frozen=True)
class SlowRun(Run):
    """A run that leaves a mark for each slow unit that a rank begins."""

    slow: str = ""

    @property
    def mark(self) -> Path:
        return self.directory / "slow"

    @property
    def stop_file(self) -> Path:
        return self.directory / "stop"

    def _job(self) -> None:
        if self.slow:
            self._slow_down()
        try:
            super()._job()
        except SystemExit as leaving:  # any exception is a failure to JobTree
            os._exit(int(leaving.code or 0))

    def _slow_down(self) -> None:
        from megatron_bdpo.data import prepare, sources
        from megatron_bdpo.model.hf import load
        from megatron_bdpo.training import forward, setup
        from megatron_bdpo.training.hf import exporting
        from megatron_bdpo.training.reference.passes import GroupScorer

        lay_out = exporting.lay_out
        exporting.lay_out = lambda wholes, weights: lay_out(wholes, weights, 2048)  # a file for each tensor or two
        sources._HASH_CHUNK = 1 << 10
        digest = prepare.sha256_of_file
        if self.slow == "tokenizing":
            prepare.sha256_of_file = lambda file, pause: digest(file, self._slowed(pause, UNIT, always))
        stuck = self.slow in ("set-up", "weights, stuck") and os.environ["RANK"] == "1"
        seconds = 600.0 if stuck else UNIT
        units: dict[str, list[tuple[Any, str, Callable[..., bool]]]] = {
            "set-up": [(setup, "check_directories", always)],
            "tokenizing": [],
            "weights": [(load, "fill", always)],
            "weights, stuck": [(load, "fill", always)],
            "scoring": [(GroupScorer, "__call__", always)],
            "evaluation": [(forward.PreferenceStep, "__call__", lambda step, data, model: not model.training)],
            "export": [(exporting, "_write_round", always)],
        }
        for owner, name, is_slow in units[self.slow]:
            setattr(owner, name, self._slowed(getattr(owner, name), seconds, is_slow))

    def _slowed(self, original: Callable[..., Any], seconds: float, is_slow: Callable[..., bool]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            if is_slow(*args, **kwargs):
                with self.mark.open("a") as mark:
                    mark.write(".")
                end = time.monotonic() + seconds
                while time.monotonic() < end:  # as a read that signals do not end
                    time.sleep(max(0.0, end - time.monotonic()))
            return original(*args, **kwargs)

        return slow


def always(*args: object, **kwargs: object) -> bool:
    return True


def ask(job: JobTree, run: SlowRun, how: str) -> None:
    if how == "a stop file":
        run.stop_file.touch()
        return
    name, _, whom = how.split()[0], *how.split(" to ")
    ranks = ranks_of(job.pid)
    for pid in ranks if whom == "all" else [ranks[int(whom[-1])]]:
        os.kill(pid, getattr(signal, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"of {', '.join(CASES)} (default: all)")
    phases = parser.parse_args().phases or CASES
    import tests.harness.warm  # noqa: F401  # before the forks

    with tempfile.TemporaryDirectory() as made:
        directory, board = Path(made), PhaseBoard(RANKS)
        model = _made_model(directory)
        for number, phase in enumerate(phases):
            place = directory / f"run{number}"
            place.mkdir()
            more = ("--no-pack-pairs", "--stop-file", str(place / "stop"))
            run = SlowRun(place, model, board, more, steps=4, slow=phase)
            job = run.start()
            while not run.mark.exists() and not job.ended():
                time.sleep(0.01)
            if job.ended():
                sys.exit(f"{phase} was not reached\n" + (place / "log").read_text()[-3000:])
            time.sleep(0.3)
            asked = time.monotonic()
            begun = run.mark.stat().st_size
            ask(job, run, CASES[phase])
            code = -1
            with contextlib.suppress(TimeoutError):
                code = job.wait(60)
            seconds = time.monotonic() - asked
            status = json.loads((run.save / "status.json").read_text()) if (run.save / "status.json").exists() else {}
            begun = run.mark.stat().st_size - begun
            told = {key: status.get(key) for key in ("state", "phase", "step", "reason")}
            print(
                json.dumps(
                    {
                        "case": phase,
                        "how": CASES[phase],
                        "seconds": round(seconds, 1),
                        "begun": begun,
                        "code": code,
                        **told,
                    }
                )
            )
            if code or status.get("state") != "stopped":
                print((place / "log").read_text()[-3000:], file=sys.stderr)


if __name__ == "__main__":
    main()
