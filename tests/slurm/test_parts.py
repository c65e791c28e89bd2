"""Parts of ``slurm/lib`` by themselves, without SLURM: claims that race, strikes, judging of links, Xid, images."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

LIBRARY = ROOT / "slurm" / "lib.sh"

#: Variables of an attempt, as lib.sh sets them.
ATTEMPT = {
    "SLURM_JOB_ID": "7",
    "TAG": "7.0",
    "SLURM_NNODES": "8",
    "SLURM_JOB_PARTITION": "p",
    "SLURM_JOB_NODELIST": "n",
}


def bash(code: str, directory: Path, programs: dict[str, str] | None = None, **environment: str):
    """Run shell code after lib.sh was sourced, with programs of ours on the PATH."""
    for name, text in (programs or {}).items():
        program = directory / "bin" / name
        program.parent.mkdir(exist_ok=True)
        new = program.with_suffix(".new")
        new.write_text(f"#!/bin/bash\n{text}\n")
        new.chmod(0o755)
        new.replace(program)  # in one step: another process may be running it
    variables = os.environ | ATTEMPT | {"CONTROL": str(directory), "LOGS": str(directory), "RUN_DIR": str(directory)}
    variables["PATH"] = f"{directory / 'bin'}:{os.environ['PATH']}"
    command = ["bash", "-c", f'. "{LIBRARY}"\n{code}']
    return subprocess.Popen(
        command, env=variables | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory
    )


def said(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_the_documents_name_tests_that_there_are():
    """The table of docs/reliability.md: every test of the launcher's cases, and none that is not there."""
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    section = page[page.index("## SLURM") : page.index("## Soak")]
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests" / "slurm").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", section))
    assert [name for name in named if f"def {name}(" not in tests] == []
    cases = (ROOT / "tests" / "slurm" / "test_matrix.py").read_text("utf-8")
    assert set(re.findall(r"^def (test_\w+)\(", cases, re.MULTILINE)) - named == {"test_limits_and_ports"}


# ---- claims ----------------------------------------------------------------------------------------------------------

#: squeue: jobs below $ALIVE are gone.
SQUEUE = """
while [ "$1" != --job ]; do shift; done
[ "$2" -ge "$ALIVE" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
echo RUNNING
"""


def test_one_of_many_that_race_succeeds_a_job_that_is_gone(tmp_path):
    """Five times: all see that the owner is gone, and start at the same moment."""
    rivals = 24
    for turn in range(5):
        alive, begin = 100 * (turn + 1), tmp_path / f"begin.{turn}"
        code = f'until [ -e {begin} ]; do :; done; claim && echo "owner $SLURM_JOB_ID"'
        racing = [
            bash(code, tmp_path, {"squeue": SQUEUE}, SLURM_JOB_ID=str(job), TAG=f"{job}.0", ALIVE=str(alive))
            for job in range(alive, alive + rivals)
        ]
        time.sleep(1)
        begin.touch()
        ends = [said(process) for process in racing]
        owners = [output for code, output in ends if code == 0]
        assert len(owners) == 1 and owners[0].startswith("owner "), ends
        assert all("refused: job" in output for code, output in ends if code)


def test_a_claim_is_kept_by_the_next_attempt_and_refuses_others(tmp_path):
    for attempt in range(2):
        assert said(bash("claim", tmp_path, {"squeue": SQUEUE}, TAG=f"7.{attempt}", ALIVE="1")) == (0, "")
    code, output = said(bash("claim", tmp_path, {"squeue": SQUEUE}, SLURM_JOB_ID="8", TAG="8.0", ALIVE="1"))
    assert code == 2 and output.startswith(f"bdpo: refused: job 7 is using {tmp_path}")
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["claim.1"]
    assert list(tmp_path.glob(".claim*")) == []


def test_a_controller_that_does_not_answer_leaves_the_claim(tmp_path):
    said(bash("claim", tmp_path, {"squeue": SQUEUE}, ALIVE="1"))
    silent = {"squeue": "echo 'Unable to contact slurm controller' >&2; exit 1"}
    assert said(bash("claim", tmp_path, silent, SLURM_JOB_ID="8", TAG="8.0"))[0] == 2


def test_an_attempt_that_was_succeeded_ends(tmp_path):
    """Its ranks are told to stop. Where the file system is away, nothing is known of another."""
    assert said(bash("succeed; leave_if_succeeded; echo on", tmp_path)) == (0, "on\n")
    assert list(tmp_path.glob("stop*")) == []
    assert said(bash("succeed", tmp_path, TAG="7.1")) == (0, "")
    assert [path.name for path in tmp_path.glob("stop*")] == ["stop.7.0"]
    code, output = said(bash("leave_if_succeeded; echo on", tmp_path))
    assert code == 2 and output == "bdpo: attempt 7.0 ends here: 7.1 has gone on from it.\n"
    (tmp_path / "current").unlink()
    assert said(bash("leave_if_succeeded; echo on", tmp_path)) == (0, "on\n")


# ---- what has happened -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {
                "state": "hung",
                "phase": "scoring",
                "step": 3,
                "of": 9,
                "reason": 'rank 1, on node5, in "all_reduce" {x}',
            },
            'hung in scoring, last checkpoint of step 5: rank 1, on node5, in "all_reduce" {x}',
        ),
        (
            {"state": "running", "phase": "training", "reason": "", "cause": "rank 0 stood still"},
            "hung in training, last checkpoint of step 5: rank 0 stood still",
        ),
        (
            {"state": "running", "phase": None, "reason": "", "cause": None},
            "crashed, last checkpoint of step 5: srun ended with 9",
        ),
    ],
)
def test_what_happened_is_told_whole(tmp_path, status, expected):
    (tmp_path / "status.json").write_text(json.dumps(status) + "\n")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "srun.log").touch()
    (tmp_path / "node1.log").touch()
    found = bash("what_happened 9; status step", tmp_path, BDPO_STATUS_FILE=str(tmp_path / "status.json"))
    assert said(found)[1].splitlines() == [expected] + ["3"] * ("step" in status)


# ---- strikes ---------------------------------------------------------------------------------------------------------

SETTINGS = {"BDPO_EXCLUDE_PERCENT": "25", "BDPO_STRIKE_MINUTES": "60"}


def left_out(tmp_path: Path, strikes: list[tuple[float, str]], usable: int = 20, **environment: str) -> list[str]:
    """Strikes: minutes ago, node."""
    lines = (f"{time.time() - 60 * minutes:.0f} {node} 7.0\n" for minutes, node in strikes)
    (tmp_path / "strikes").write_text("".join(lines))
    sinfo = "; ".join([*(f"echo node{index} idle" for index in range(usable)), "echo broken down*", "echo kept drain"])
    scontrol = 'if [ $2 = job ]; then echo "JobId=7 ExcNodeList=node[0-1] x"; else printf "node0\\nnode1\\n"; fi'
    programs = {"sinfo": sinfo, "scontrol": scontrol}
    return said(bash("left_out", tmp_path, programs, **(SETTINGS | environment)))[1].split()


def test_strikes_expire_and_add_up(tmp_path):
    assert left_out(tmp_path, [(59, "a"), (61, "b")]) == ["a"]
    assert left_out(tmp_path, [(61, "b"), (90, "b")]) == ["b"]
    assert left_out(tmp_path, [(121, "b"), (130, "b")]) == []
    assert left_out(tmp_path, [(1441 + 60 * index, "b") for index in range(40)]) == []
    assert left_out(tmp_path, []) == []


def test_no_more_than_the_share_is_left_out(tmp_path):
    """Of eight nodes two: those with most strikes, then the latest."""
    strikes = [(5, "a"), (4, "b"), (3, "c"), (9, "d"), (10, "d")]
    assert left_out(tmp_path, strikes) == ["d", "c"]
    assert left_out(tmp_path, strikes, SLURM_NNODES="2") == ["d"]
    assert left_out(tmp_path, strikes, usable=22, SLURM_NNODES="16") == ["d", "c", "b", "a"]


def test_no_more_than_the_partition_can_spare(tmp_path):
    """Else the job would wait for ever. Two are excluded by the user."""
    assert left_out(tmp_path, [(5, "a"), (4, "b")], usable=12) == ["b", "a"]
    assert left_out(tmp_path, [(5, "a"), (4, "b")], usable=11) == ["b"]
    assert left_out(tmp_path, [(5, "a"), (4, "b")], usable=10) == []


# ---- links -----------------------------------------------------------------------------------------------------------


def judged(tmp_path: Path, **seen: str) -> list[str]:
    (tmp_path / "links").mkdir(exist_ok=True)
    for node, lines in seen.items():
        if lines != "missing":
            (tmp_path / "links" / node).write_text(lines.replace(";", "\n") + "\n" if lines else "")
    return said(bash("judge_links", tmp_path, {"scontrol": f"printf '%s\\n' {' '.join(seen)}"}))[1].splitlines()


def test_broken_and_slow_nodes_are_named(tmp_path):
    well = {"a": "b 20.0;d 19.0", "b": "a 20.0;c 1.0", "c": "b 1.0;d 1.1", "d": "c 1.1;a 19.0"}
    assert judged(tmp_path, **well) == ["c exchanges 1.1 GB/s, where 20 are usual"]
    broken = {
        "a": "b 20;d failed no answer in 60 s",
        "b": "a 20;c 18",
        "c": "b 18;d failed x",
        "d": "c failed x;a failed y",
    }
    assert judged(tmp_path, **broken) == ["d no exchange with c a"]
    (tmp_path / "links" / "d").unlink()
    assert judged(tmp_path, **(broken | {"d": "missing"})) == ["d no answer"]


def test_two_nodes_cannot_tell_which_of_them_it_is(tmp_path):
    assert [line.split()[0] for line in judged(tmp_path, a="b failed x", b="a failed x")] == ["a", "b"]
    assert judged(tmp_path, a="b 1", b="a 1") == []


def links():
    spec = importlib.util.spec_from_file_location("links", ROOT / "slurm" / "lib" / "links.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("nodes", range(1, 12))
def test_each_pair_of_the_ring_once(nodes):
    found = links().rounds(nodes)
    for edges in found:
        ends = [node for edge in edges for node in set(edge)]
        assert len(ends) == len(set(ends)), "no node twice in a round"
    expected = {frozenset((node, (node + 1) % nodes)) for node in range(nodes)}
    assert {frozenset(edge) for edges in found for edge in edges} == expected
    assert sum(map(len, found)) == len(expected) and len(found) <= 3


@pytest.mark.slow
def test_the_exchange_itself(tmp_path):
    """Three nodes on this machine; the last one's numbers are wrong, because its process is another program."""
    environment = os.environ | {"BDPO_PORT": "20008", "BDPO_LINKS_SECONDS": "6", "BDPO_DEVICE": "cpu"}
    command = [sys.executable, str(ROOT / "slurm" / "lib" / "links.py"), str(tmp_path)]
    names = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    two = [subprocess.Popen([*command, str(number), *names], env=environment) for number in range(2)]
    assert [process.wait(120) for process in two] == [0, 0]
    seen = {name: (tmp_path / name).read_text() for name in names[:2]}
    for own, other in ((0, 1), (1, 0)):
        lines = dict(line.split(" ", 1) for line in seen[names[own]].splitlines())
        assert float(lines[names[other]]) > 0
        assert lines[names[2]].startswith("failed")


# ---- GPUs ------------------------------------------------------------------------------------------------------------

GPUS = {"nvidia-smi": "for i in {0..7}; do echo GPU $i: NVIDIA H100; done"}


def xid(tmp_path: Path, *codes: int) -> tuple[int, str]:
    lines = "; ".join(f"echo '[Fri] NVRM: Xid (PCI:0000:3b:00): {code}, pid=1, name=python'" for code in codes)
    programs = GPUS | {"dmesg": f'echo "$*" > {tmp_path}/asked; {lines or ":"}'}
    settings = {"BDPO_PREFLIGHT_SECONDS": "1", "BDPO_RANKS_PER_NODE": "8", "BDPO_BEGAN": "1700000000", "TZ": "UTC"}
    return said(bash("look_at_gpus", tmp_path, programs, **settings))


@pytest.mark.parametrize("code", [48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140, 143])
def test_a_fault_of_the_hardware_is_told(tmp_path, code):
    expected = f"bdpo: the driver has reported a fault of a GPU: Xid (PCI:0000:3b:00): {code}, pid=1, name=python\n"
    assert xid(tmp_path, 13, code, 31) == (2, expected)
    assert (tmp_path / "asked").read_text() == "--since 2023-11-14 22:13:20\n"  # when the job began


def test_what_a_program_causes_is_no_fault(tmp_path):
    assert xid(tmp_path, 13, 31, 43, 45, 68, 109, 4, 163, 790) == (0, "")
    assert xid(tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sleep 100", "nvidia-smi ended with 124 (124: no answer in 1 s)"),
        ("echo No devices were found; exit 6", "nvidia-smi ended with 6"),
        ("for i in {0..6}; do echo GPU $i: NVIDIA H100; done", "nvidia-smi sees 7 GPUs, not 8"),
    ],
)
def test_gpus_that_are_missing(tmp_path, program, words):
    settings = {"BDPO_PREFLIGHT_SECONDS": "1", "BDPO_RANKS_PER_NODE": "8", "BDPO_BEGAN": "1700000000"}
    began = time.monotonic()
    code, output = said(bash("look_at_gpus", tmp_path, {"nvidia-smi": program, "dmesg": ""}, **settings))
    assert code == 2 and words in output
    assert time.monotonic() - began < 40, "the limit is a second"


# ---- images ----------------------------------------------------------------------------------------------------------


def test_an_image_is_imported_once(tmp_path):
    """By six jobs at a time, with enroot; a file is itself, and one that fails leaves nothing."""
    enroot = (
        f'[ "$1 $2" = "import --output" ] || exit 9; echo "$4" >> {tmp_path}/imported; sleep 0.5; echo image > "$3"'
    )
    settings = {"BDPO_CONTAINER_CACHE": str(tmp_path / "images")}
    code = 'imported enroot sqsh "nvcr.io#nvidia/pytorch:25.06-py3" import --output'
    ends = [said(process) for process in [bash(code, tmp_path, {"enroot": enroot}, **settings) for _ in range(6)]]
    file = tmp_path / "images" / "nvcr.io_nvidia_pytorch_25.06-py3.sqsh"
    assert {(code, output.splitlines()[-1]) for code, output in ends} == {(0, str(file))}
    assert (tmp_path / "imported").read_text() == "docker://nvcr.io#nvidia/pytorch:25.06-py3\n"
    assert said(bash(f"imported enroot sqsh {file} import --output", tmp_path)) == (0, f"{file}\n")
    file.unlink()
    failing = bash("imported enroot sqsh a import --output", tmp_path, {"enroot": "exit 1"}, **settings)
    ended, output = said(failing)
    assert ended == 2 and "BDPO_CONTAINER=a could not be imported by enroot" in output
    assert not list((tmp_path / "images").glob("a.*sqsh"))
