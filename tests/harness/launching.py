"""torchrun, itself and its ranks forked from the warm server: the launcher's own code, without 4 s for each process."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.harness.ranks import start_server
from tests.harness.rendezvous import free_port


def torchrun(
    ranks: int, script: Path, arguments: Sequence[str], directory: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of Python's on so many ranks of a launcher, each in a session of its own.

    Args:
        directory: for what they print.
        environment: beside this process's.
    """
    streams = [directory / "launcher.out", directory / "launcher.err"]
    command = ["--nproc-per-node", str(ranks), "--master-port", str(free_port()), str(script), *arguments]
    launcher = start_server().Process(target=_launch, args=(command, os.environ | environment, streams))
    launcher.start()
    launcher.join(timeout)
    if launcher.exitcode is None:
        launcher.terminate()  # it ends its ranks
        launcher.join()
        raise TimeoutError(f"the launcher has not ended within {timeout} s\n" + streams[1].read_text()[-3000:])
    return subprocess.CompletedProcess(command, launcher.exitcode, *(each.read_text() for each in streams))


def _launch(command: Sequence[str], environment: Mapping[str, str], streams: Sequence[Path]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    for stream, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    _begin(environment)
    with mock.patch.object(subprocess_handler, "Popen", _Forked):
        run.main(list(command))


def _begin(environment: Mapping[str, str]) -> None:
    """Forget what a fork leaves of the process before it."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Forked(subprocess.Popen[str]):
    """A process of ``python -u SCRIPT ARGUMENTS`` that is forked from this one."""

    def _execute_child(self, args: Sequence[str], *others: Any) -> None:
        _, _, script, *arguments = args
        environment = others[5]
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _begin(environment)
            with _exit_at_the_end():
                sys.argv = [script, *arguments]
                runpy.run_path(script, run_name="__main__")
        self._child_created = True


@contextlib.contextmanager
def _exit_at_the_end() -> Iterator[None]:
    """With the code that Python would end with."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
