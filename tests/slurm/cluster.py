"""The cluster of ``lab.sh`` as the tests see it: submit the shipped scripts, watch their logs, do them harm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Everything here takes seconds; on a crowded machine perhaps a minute.
PATIENCE = 300

#: What the shell code of stand-ins may use. $start is the number of the attempt, "+", that of the start in it.
HELPERS = r"""
attempt=${SLURM_RESTART_COUNT:-0} start=${BDPO_RENDEZVOUS:-} start=${start#*.} node=$SLURM_NODEID
# status STATE [MORE FIELDS]
status() { echo "{\"state\": \"$1\", \"step\": 2, \"of\": 2, \"reason\": \"\"${2:-}}" > "$BDPO_STATUS_FILE"; }
finish() { sleep 0.3; [ "$node" != 0 ] || status finished; exit 0; }
# seen LINE: waits until a rank has said it
seen() { until grep -qsE "$1" "$LOGS"/*.log; do sleep 0.1; done; }
# What --signal=B:USR1@... does before the time limit.
ask_to_stop() { [ "$node" != 0 ] || scancel --batch --signal=USR1 "$SLURM_JOB_ID"; }
"""


@dataclass
class Case:
    """What a job is given that has a stand-in for Python, or a training that does itself some harm."""

    torchrun: str = "exit 0"
    """Shell code of each node's torchrun."""
    other: str = "exit 0"
    """Of all else."""
    settings: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    """In the place of those on the PATH."""
    options: tuple[str, ...] = ()
    """Of sbatch."""
    nodes: int = 2
    partition: str = "small"
    flags: tuple[str, ...] = ()
    """Of the trainer."""
    script: str = "bdpo_70b.sh"
    ranks_per_node: int = 1


def training(harm: str = "", **given: Any) -> Case:
    """A real one, of two nodes. The harm is shell code that runs beside each node's torchrun."""
    python = f'exec {sys.executable} "$@"'
    beside = f"{{ {harm}\n}} &\n" if harm else ""
    return Case(f"{beside}{python}", python, partition="debug", **given)


@dataclass
class Cluster:
    """Four nodes are in the partition ``debug``, six in ``small``, one in ``free``. They share ``directory``."""

    directory: Path

    def lab(self, *command: str, **environment: str) -> str:
        """Run a command of ``lab.sh``. Returns its output."""
        shared = ":".join(
            map(str, (self.directory, ROOT, sys.prefix))
        )  # where they are below /tmp, which nodes have each
        variables = os.environ | {"LAB": str(self.directory / "lab"), "SHARED": shared} | environment
        done = subprocess.run(
            [str(ROOT / "tests" / "slurm" / "lab.sh"), *command],
            cwd=self.directory, env=variables, text=True, capture_output=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"lab.sh {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(
        self,
        run: str,
        *flags: str,
        script: str = "bdpo_70b.sh",
        ranks_per_node: int = 1,
        nodes: int = 2,
        options: tuple[str, ...] = (),
        **environment: str,
    ) -> Job:
        """Submit a script of ``slurm/`` with the tiny recipe on the CPU, into the run directory of that name."""
        directory = self.directory / run
        settings = {
            "BDPO_HOME": str(ROOT),
            "BDPO_PYTHON": sys.executable,
            "BDPO_RANKS_PER_NODE": str(ranks_per_node),
            "BDPO_DEVICE": "cpu",
            "BDPO_SITE": "/dev/null",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RECIPE": str(ROOT / "recipes" / "tiny.yaml"),
            "RUN_DIR": str(directory),
            "BDPO_RESTARTS": "0",
            "BDPO_LINKS": "0",
        }
        command = ["sbatch", "--parsable", f"--nodes={nodes}", *options, str(ROOT / "slurm" / script), *flags]
        answer = self.lab("exec", *command, **(settings | environment))
        return Job(self, int(answer), script.removesuffix(".sh"), directory)

    def submit_case(self, name: str, case: Case) -> Job:
        settings = {"BDPO_PYTHON": self.stand_in(name, case.torchrun, case.other)}
        if case.programs:
            settings["PATH"] = self.instead(name, case.programs)
        settings["BDPO_CONTAINER_CACHE"] = str(self.directory / f"images_{name}")
        flags = [flag.format(directory=self.directory) for flag in case.flags]
        return self.submit(
            name, *flags, script=case.script, ranks_per_node=case.ranks_per_node, nodes=case.nodes,
            options=(f"--partition={case.partition}", *case.options), **(settings | case.settings),
        )  # fmt: skip

    def stand_in(self, name: str, torchrun: str, other: str = "exit 0") -> str:
        """A program in the place of Python: shell code of a node's torchrun, and of all else. Returns its path."""
        path = self.directory / "stand_ins" / name / "python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\n{HELPERS}case "$*" in *distributed.run*)\n{torchrun}\nexit;; esac\n{other}\n')
        path.chmod(0o755)
        return str(path)

    def instead(self, name: str, programs: dict[str, str]) -> str:
        """A PATH on which these programs are shell code of ours."""
        directory = self.directory / "stand_ins" / name
        directory.mkdir(parents=True, exist_ok=True)
        for program, code in programs.items():
            path = directory / program
            path.write_text(f"#!/bin/bash\n{code}\n")
            path.chmod(0o755)
        return f"{directory}:{os.environ['PATH']}"


@dataclass(frozen=True)
class Job:
    """A submitted job and its run directory."""

    cluster: Cluster
    id: int
    name: str
    run: Path

    @property
    def log(self) -> str:
        """What the batch script has said, over all attempts."""
        path = self.cluster.directory / f"{self.name}-{self.id}.log"
        return path.read_text() if path.exists() else ""

    @property
    def last_line(self) -> str:
        """Of the log."""
        return self.log.strip().splitlines()[-1]

    def rank_logs(self, attempt: int | str = "*") -> str:
        """What the ranks have said."""
        logs = sorted(self.run.glob(f"slurm/*/logs/{self.id}.{attempt}/node*.log"))
        return "".join(path.read_text() for path in logs)

    @property
    def state(self) -> str:
        """SLURM's word for it."""
        shown = self.cluster.lab("exec", "scontrol", "show", "job", "-o", str(self.id))
        return re.findall(r"JobState=(\w+)", shown)[-1]

    def signal(self) -> None:
        """What ``--signal=B:USR1@...`` does before the time limit."""
        self.cluster.lab("exec", "scancel", "--batch", "--signal=USR1", str(self.id))

    def wait_for(self, seen: Callable[[], object], what: str) -> None:
        """Until ``seen()`` is true."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not seen in {PATIENCE} s\n{self.log}\n{self.rank_logs()[-3000:]}")
            time.sleep(0.1)

    def wait_for_step(self, step: int, attempt: int = 0) -> None:
        """Until that optimizer step is done in that attempt."""
        line = re.compile(rf"^step +{step}/", re.MULTILINE)
        self.wait_for(lambda: line.search(self.rank_logs(attempt)), f"step {step} of attempt {attempt}")

    def wait(self, expected_state: str = "COMPLETED") -> None:
        """Until the job has ended, with the state that is expected."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait_for(lambda: self.state in ended, "the end of the job")
        assert self.state == expected_state, f"{self.state}\n{self.log}\n{self.rank_logs()[-3000:]}"
