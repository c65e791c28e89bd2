"""``BDPO_NOTIFY``: a command of the user's that hears how a job has ended: a mail, a message, a metric."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

#: The command, which bash reads, here as in ``slurm/``.
COMMAND = "BDPO_NOTIFY"

#: Seconds that it may take.
LIMIT = "BDPO_NOTIFY_SECONDS"

_SECONDS = 30.0


def notify(state: str, *, step: int, of: int, cause: str, run: str) -> None:
    """Run the command and wait for it, or end it. Whatever comes of it is told and changes nothing.

    Args:
        state: finished, stopped, refused, crashed or hung.
        cause: one line; empty of a run that is finished.
        run: the directory of ``--save``.
    """
    command = os.environ.get(COMMAND)
    if not command:
        return
    told = {"STATE": state, "STEP": str(step), "STEPS": str(of), "CAUSE": " ".join(cause.split()), "RUN": run}
    environment = os.environ | {f"BDPO_{name}": value for name, value in told.items()}
    try:
        problem = _run(command, environment, limit())
    except OSError as error:
        problem = str(error)
    if problem:
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{COMMAND}: {problem}\n".encode())


def limit() -> float:
    """Seconds that the command may take."""
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ[LIMIT])
    return _SECONDS


def _run(command: str, environment: dict[str, str], seconds: float) -> str:
    """What went wrong, if anything did."""
    # Its own session: it is ended with all that it has started, and a Ctrl-C that ends the job does not end it.
    with subprocess.Popen(
        ["bash", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"ended after {seconds:g} s"
    return f"exit code {code}" if code else ""
