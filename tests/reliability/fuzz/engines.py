"""Where the bytes come from: Hypothesis, or Atheris, which looks for bytes that reach new lines of code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.fuzz.registry import Check
from tests.reliability.fuzz.targets import TARGETS

LONGEST_INPUT = 400
_AT_A_TIME = 20_000  # Hypothesis remembers what it has tried: memory
_TIMEOUT = 300  # seconds for one input, on a machine that may be busy

#: What Atheris watches.
INSTRUMENTED = (
    "megatron_bdpo.data",
    "megatron_bdpo.model.hf",
    "megatron_bdpo.training.flags",
    "megatron_bdpo.json_shape",
)


@dataclass
class Outcome:
    """What came of one target."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    coverage: int | None = None
    """Edges of the code that were reached, where the engine counts them."""
    crash: bytes | None = None
    trace: str = ""


@dataclass
class Counted:
    """A check that counts what it lets through."""

    check: Check
    inputs: int = 0
    accepted: int = 0
    after: Callable[[Counted], None] = field(default=lambda counted: None)

    def __call__(self, data: bytes) -> None:
        accepted = self.check(data)
        self.inputs += 1
        self.accepted += accepted
        self.after(self)


# Hypothesis ----------------------------------------------------------------------------------------------------------


def with_hypothesis(name: str, inputs: int, seed: int) -> Outcome:
    """Random bytes; a failing input is made small before it is shown."""
    import traceback

    import hypothesis
    from hypothesis import strategies as st

    counted, outcome = Counted(TARGETS[name].make()), Outcome()
    last = b""

    def run(data: bytes) -> None:
        nonlocal last
        last = data
        counted(data)

    start = time.perf_counter()
    for number, first in enumerate(range(0, inputs, _AT_A_TIME)):
        some = hypothesis.settings(
            max_examples=min(_AT_A_TIME, inputs - first),
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=False,
        )
        given = hypothesis.given(st.binary(min_size=24, max_size=LONGEST_INPUT))
        try:
            hypothesis.seed(seed * 1000 + number)(some(given(run)))()
        except Exception:
            outcome.crash, outcome.trace = last, traceback.format_exc()
            break
    outcome.seconds = time.perf_counter() - start
    outcome.inputs, outcome.accepted = counted.inputs, counted.accepted
    return outcome


# Atheris -------------------------------------------------------------------------------------------------------------


def with_atheris(name: str, inputs: int, seed: int) -> Outcome:
    """Guided by coverage, in a process of its own: libFuzzer ends it."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", __name__, name, str(inputs), str(seed), place]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        outcome = Outcome(seconds=time.perf_counter() - start, trace=done.stdout + done.stderr)
        with (Path(place) / "counts").open() as file:
            outcome.inputs, outcome.accepted = json.load(file)
        if covered := re.findall(r"\bcov: (\d+)", outcome.trace):
            outcome.coverage = int(covered[-1])
        artifacts = [path for path in Path(place).iterdir() if path.name.startswith(("crash-", "timeout-", "oom-"))]
        if artifacts:
            outcome.crash = artifacts[0].read_bytes()
        elif done.returncode:
            raise RuntimeError(f"atheris has not run:\n{outcome.trace[-3000:]}")
    return outcome


def _run_atheris(name: str, inputs: int, seed: int, place: Path) -> None:
    import atheris

    def count(counted: Counted) -> None:
        if counted.inputs % 500 == 0 or counted.inputs >= inputs:
            (place / "counts").write_text(json.dumps([counted.inputs, counted.accepted]))

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        check = TARGETS[name].make()
    (place / "counts").write_text("[0, 0]")
    (place / "corpus").mkdir()
    flags = {
        "runs": inputs,
        "seed": seed,
        "max_len": LONGEST_INPUT,
        "len_control": 0,
        "timeout": _TIMEOUT,
        "verbosity": 1,
    }
    options = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={place}/", str(place / "corpus")], Counted(check, after=count)
    )
    atheris.Fuzz()


ENGINES: dict[str, Callable[[str, int, int], Outcome]] = {"hypothesis": with_hypothesis, "atheris": with_atheris}

if __name__ == "__main__":
    _run_atheris(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
