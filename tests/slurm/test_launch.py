"""The shipped batch scripts on a real SLURM: what they do when told to stop, when something breaks, and at the end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.slurm.cluster import ROOT, Cluster, Job
from tests.unit.training.test_dry_run import LLAMA_70B

pytestmark = pytest.mark.slow

#: Enough steps to do something in the middle, and small ones.
STEPS = 20
FLAGS = (
    f"--train-iters={STEPS}", "--save-interval=5", "--pairs-per-step=16", "--max-pairs=64", "--eval-iters=0",
    "--num-layers=2", "--hidden-size=32", "--ffn-hidden-size=64",
)  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster) -> Job:
    """A run to the end, which another job tried to get into."""
    job = cluster.submit("undisturbed", *FLAGS)
    job.wait_for(lambda: job.run.exists(), "the start")
    intruder = cluster.submit("undisturbed", *FLAGS, nodes=1)
    intruder.wait("FAILED")
    assert f"refused: job {job.id} is using {job.run}" in intruder.log
    job.wait()
    return job


def weights(job: Job, step: int = STEPS) -> dict[str, np.ndarray]:
    """Weights and optimizer of a checkpoint."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, object] = {}
    reader = FileSystemReader(job.run / f"iter_{step:07}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value.numpy() for name, value in flat(state) if isinstance(value, torch.Tensor)}


def flat(state: dict[str, object], prefix: str = ""):
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def assert_same_weights(job: Job, undisturbed: Job) -> None:
    expected, found = weights(undisturbed), weights(job)
    assert expected.keys() == found.keys() and len(expected) > 10
    for name, expected_value in expected.items():
        assert np.array_equal(found[name], expected_value), name


def last_line(job: Job) -> str:
    return job.log.strip().splitlines()[-1]


def test_two_nodes_of_two_ranks(cluster):
    layout = ("--tensor-model-parallel-size=2", "--train-iters=3", "--save-interval=3")
    job = cluster.submit("two_by_two", *FLAGS, *layout, ranks_per_node=2)
    job.wait()
    assert last_line(job) == f"bdpo: job {job.id}, attempt 0: finished, step 3 of 3"
    assert "using world size: 4" in (job.run / "megatron.log").read_text()
    again = cluster.submit("two_by_two", *FLAGS, *layout, ranks_per_node=2)
    again.wait()
    assert "finished already, step 3 of 3" in last_line(again)


def test_a_second_job_in_the_same_run_directory_is_refused(undisturbed):
    assert last_line(undisturbed) == f"bdpo: job {undisturbed.id}, attempt 0: finished, step {STEPS} of {STEPS}"


def test_stop_in_mid_run(cluster, undisturbed):
    job = cluster.submit("stopped", *FLAGS)
    job.wait_for_step(7)
    job.signal()
    job.wait()
    (stopped,) = re.findall(r"attempt 0: stopped, checkpoint of step (\d+); requeued", job.log)
    assert 7 <= int(stopped) < STEPS
    assert f"attempt 1, train on node[1-2]: {job.run}, step {stopped}" in job.log
    assert not re.search(r"^step +7/", job.rank_logs(1), re.MULTILINE), "no step is done twice"
    assert_same_weights(job, undisturbed)


def test_stop_during_start_up(cluster):
    job = cluster.submit("stopped_early", *FLAGS, "--train-iters=2", nodes=1)
    job.wait_for(lambda: "logs:" in job.log, "the launch")
    job.signal()
    job.wait()
    assert "attempt 0: stopped, checkpoint of step 0; requeued" in job.log
    assert last_line(job).endswith("attempt 1: finished, step 2 of 2")


def test_scoring_ahead_of_the_training(cluster):
    """A job of its own, stopped while it scores; the training finds what it has left.

    That its cache is elsewhere makes no difference: an attempt without progress would be the last.
    """
    cache = cluster.directory / "cache_elsewhere"
    flags = (*FLAGS, "--train-iters=2", f"--pair-cache-dir={cache}")
    scoring = cluster.submit("scored", *flags, script="score.sh", nodes=1, BDPO_MAX_STALLED="1")
    scoring.wait_for(lambda: any(cache.glob("*/meta.json")), "the tokens")
    scoring.signal()
    scoring.wait()
    assert "attempt 0: stopped" in scoring.log
    assert last_line(scoring).endswith("attempt 1: finished")
    (scored,) = re.findall(r"64 train pairs, (\d+) of them scored now", scoring.rank_logs(1))
    assert 0 < int(scored) < 64
    training = cluster.submit("scored", *flags, nodes=1)
    training.wait()
    assert re.search(r"\d+ train pairs, 0 of them scored now", training.rank_logs())


def test_tokenizing_ahead_of_the_training(cluster):
    """By both nodes; a stop that comes before the first shard costs an attempt and no more."""
    job = cluster.submit("prepared", *FLAGS, script="prepare.sh")
    job.wait_for(lambda: "logs:" in job.log, "the launch")
    job.signal()
    job.wait()
    assert "attempt 0: stopped" in job.log
    assert last_line(job).endswith("attempt 1: finished")
    assert len(list((job.run / "cache").glob("*/meta.json"))) == 2  # training and held-out pairs


def test_kill_switch(cluster):
    job = cluster.submit("switched_off", *FLAGS, nodes=1)
    job.wait_for(lambda: "logs:" in job.log, "the launch")
    (job.run / "STOP").touch()
    job.wait()
    assert "attempt 0: stopped by" in last_line(job)
    assert "remove it and submit again to go on" in last_line(job)


def test_killed_rank(cluster, undisturbed):
    job = cluster.submit("killed", *FLAGS)
    job.wait_for_step(10)
    cluster.lab("on", "node2", "pkill", "-KILL", "-f", "-o", "python[^ ]* -u examples/pretrain_bdpo.py")
    job.wait()
    assert re.search(
        r"attempt 0: crashed, last checkpoint of step \d+: rank 1 on node2 ended with -9; requeued", job.log
    )
    assert_same_weights(job, undisturbed)


def test_crash_that_repeats(cluster):
    python = cluster.directory / "broken_python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *distributed.run*) [ "$(hostname)" = node2 ] || exec sleep 300\n'
        'echo "RuntimeError: broken for the test" >&2; exit 3 ;; esac\n'
        'exit 0\n'
    )  # fmt: skip
    python.chmod(0o755)
    job = cluster.submit("crashing", *FLAGS, BDPO_PYTHON=str(python), BDPO_MAX_STALLED="2")
    job.wait("FAILED")
    assert job.log.count("attempt 0: crashed") == 1
    # The other nodes were terminated for it: their 143, which srun ends with, is not the cause.
    assert last_line(job) == (
        f"bdpo: job {job.id}, attempt 1: gave up after 2 attempts without progress: crashed, "
        "last checkpoint of step 0: torchrun on node2 ended with 3: RuntimeError: broken for the test"
    )


def test_what_the_trainer_refuses_is_not_tried_again(cluster):
    job = cluster.submit("refused", *FLAGS, "--pairs-per-step=1000", nodes=1)
    job.wait("FAILED")
    assert "attempt 0: refused, not tried again: --pairs-per-step 1000 is more than" in last_line(job)


def test_lost_node(cluster, undisturbed):
    job = cluster.submit("lost", *FLAGS)
    job.wait_for_step(6)
    cluster.lab("kill-node", "node2")
    try:
        job.wait()
    finally:
        cluster.lab("start-node", "node2")
    assert re.search(r"attempt [12], train on node\[1,3\]: .*, step [5-9]", job.log)
    assert_same_weights(job, undisturbed)


def test_shellcheck():
    scripts = [
        *ROOT.glob("slurm/**/*.sh"),
        *ROOT.glob("tests/slurm/*.sh"),
        *ROOT.glob("tools/*.sh"),
        ROOT / ".ci" / "run",
    ]
    try:
        done = subprocess.run(
            ["shellcheck", "-x", "-P", str(ROOT), *map(str, scripts)], text=True, capture_output=True, cwd=ROOT
        )
    except FileNotFoundError:
        pytest.skip("needs shellcheck: make slurm-lab, as root on Debian")
    assert done.returncode == 0, done.stdout


def test_outside_slurm_the_way_out_is_said():
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "bdpo_8b.sh")],
        env=os.environ | {"BDPO_PYTHON": sys.executable}, cwd=Path.home(), text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "submit this with sbatch" in done.stderr


EIGHT_NODES = ("4 tensor x 4 pipeline x 5 virtual stages x 2 context x 2 data", "64 ranks, 8 nodes of 8")
ONE_NODE = ("4 tensor x 2 pipeline x 8 virtual stages", "8 ranks, 1 nodes of 8")


@pytest.mark.parametrize(
    ("script", "recipe", "more", "expected"),
    [
        ("bdpo_70b.sh", "llama3_70b.yaml", {}, EIGHT_NODES),
        ("bdpo_8b.sh", "llama3_70b.yaml", {"SBATCH_NODES": "8"}, EIGHT_NODES),
        ("bdpo_70b_lora.sh", "llama3_70b_lora.yaml", {}, ONE_NODE),
    ],
)
def test_dry_run_of_the_70b_job(tmp_path, script, recipe, more, expected):
    """With the real configuration of the model and a tokenizer of ours; the recipe is the site's."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    data = ROOT / "examples" / "data"
    site = {"RECIPE": ROOT / "recipes" / recipe, "HF_MODEL": tmp_path / "model", "RUN_DIR": "/not/this/one"}
    lines = [f"export {name}=${{{name}:-{shlex.quote(str(value))}}}\n" for name, value in site.items()]
    (tmp_path / "site.sh").write_text("".join(lines))
    settings = {
        "BDPO_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "BDPO_SITE": str(tmp_path / "site.sh"),
        "PAIR_DATA": str(data / "train.jsonl"),
        "RUN_DIR": str(tmp_path / "run"),
    }
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(data / "tokenizer.model")]
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), "--dry-run", *tokenizer],
        env=os.environ | settings | more, cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected_layout, expected_cluster = expected
    assert f"layout: {expected_layout}\n" in done.stdout
    assert f"dry run of {expected_cluster}\n" in done.stdout
    assert f"kept in: {tmp_path / 'run'}," in done.stdout, "the environment wins over the site"
