"""The shipped batch scripts on a real SLURM: what they do when told to stop, when something breaks, and at the end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.slurm.cluster import ROOT, Case, Job, training
from tests.unit.training.test_dry_run import LLAMA_70B

pytestmark = pytest.mark.slow

#: Enough steps to do something in the middle, and small ones.
STEPS = 20
FLAGS = (
    f"--train-iters={STEPS}", "--save-interval=5", "--pairs-per-step=16", "--max-pairs=64", "--eval-iters=0",
    "--num-layers=2", "--hidden-size=32", "--ffn-hidden-size=64",
)  # fmt: skip


TRAININGS = {
    "undisturbed": training(flags=FLAGS),
    "two_by_two": training(
        flags=(*FLAGS, "--tensor-model-parallel-size=2", "--train-iters=3", "--save-interval=3"), ranks_per_node=2
    ),
    "stopped": training('[ $attempt = 1 ] || { seen "^step +7/"; ask_to_stop; }', flags=FLAGS),
    "stopped_early": training("[ $attempt = 1 ] || ask_to_stop", flags=(*FLAGS, "--train-iters=2"), nodes=1),
    # An attempt without progress would be the last.
    "scored": training(
        '[ $attempt = 1 ] || { seen "scoring the reference"; ask_to_stop; }',
        flags=(*FLAGS, "--train-iters=2", "--pair-cache-dir={directory}/elsewhere"),
        script="score.sh",
        settings={"BDPO_MAX_STALLED": "1"},
        nodes=1,
    ),
    "prepared": training(  # held-out pairs too, which a job that never evaluates does not read
        "[ $attempt = 1 ] || ask_to_stop",
        flags=[flag for flag in FLAGS if flag != "--eval-iters=0"],
        script="prepare.sh",
    ),
    "switched_off": training("touch $RUN_DIR/STOP", flags=FLAGS, nodes=1),
    "killed": training(
        """[ "$attempt $node" != "0 1" ] || {
            seen "^step +10/"
            pkill -KILL -f -o "python[^ ]* -u examples/pretrain_bdpo.py"
        }""",
        flags=FLAGS,
    ),
    "refused": training(flags=(*FLAGS, "--pairs-per-step=1000"), nodes=1),
    "crashing": Case(
        """[ $node = 1 ] || exec sleep 300
        echo "RuntimeError: broken for the test" >&2; exit 3""",
        settings={"BDPO_MAX_STALLED": "2"},
    ),
}


def uses(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The trainings of a test."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        test.trainings = names  # type: ignore[attr-defined]
        return test

    return mark


@pytest.fixture
def undisturbed(trainings: dict[str, Job]) -> Job:
    """A run to the end."""
    trainings["undisturbed"].wait()
    return trainings["undisturbed"]


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


@uses("undisturbed")
def test_a_second_job_in_the_same_run_directory_is_refused(cluster, trainings):
    job = trainings["undisturbed"]
    job.wait_for(lambda: job.run.exists(), "the start")
    intruder = cluster.submit("undisturbed", *FLAGS, nodes=1, options=("--partition=free",))
    intruder.wait("FAILED")
    assert f"refused: job {job.id} is using {job.run}" in intruder.log
    job.wait()
    assert job.last_line == f"bdpo: job {job.id}, attempt 0: finished, step {STEPS} of {STEPS}"


@uses("two_by_two")
def test_two_nodes_of_two_ranks(cluster, trainings):
    job = trainings["two_by_two"]
    job.wait()
    assert job.last_line == f"bdpo: job {job.id}, attempt 0: finished, step 3 of 3"
    assert "using world size: 4" in (job.run / "megatron.log").read_text()
    again = cluster.submit("two_by_two", *FLAGS, nodes=1, options=("--partition=free",))
    again.wait()
    assert "finished already, step 3 of 3" in again.last_line


@uses("stopped", "undisturbed")
def test_stop_in_mid_run(trainings, undisturbed):
    job = trainings["stopped"]
    job.wait()
    (stopped,) = re.findall(r"attempt 0: stopped, checkpoint of step (\d+); requeued", job.log)
    assert 7 <= int(stopped) < STEPS
    assert re.search(rf"attempt 1, train on node\S+: {job.run}, step {stopped}$", job.log, re.MULTILINE)
    assert not re.search(r"^step +7/", job.rank_logs(1), re.MULTILINE), "no step is done twice"
    assert_same_weights(job, undisturbed)


@uses("stopped_early")
def test_stop_during_start_up(trainings):
    job = trainings["stopped_early"]
    job.wait()
    assert "attempt 0: stopped, checkpoint of step 0; requeued" in job.log
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")


@uses("scored")
def test_scoring_ahead_of_the_training(cluster, trainings):
    """A job of its own, stopped while it scores into a cache elsewhere; the training finds what it has left."""
    scoring = trainings["scored"]
    scoring.wait()
    assert "attempt 0: stopped" in scoring.log
    assert scoring.last_line.endswith("attempt 1: finished")
    left = re.findall(r"(?:64 train|99 heldout) pairs, (\d+) of them scored now", scoring.rank_logs(1))
    assert len(left) == 2 and 0 < sum(map(int, left)) < 64 + 99
    cache = f"--pair-cache-dir={cluster.directory}/elsewhere"
    training = cluster.submit("scored", *FLAGS, "--train-iters=2", cache, nodes=1)
    training.wait()
    assert re.search(r"\d+ train pairs, 0 of them scored now", training.rank_logs())


@uses("prepared")
def test_tokenizing_ahead_of_the_training(trainings):
    """By both nodes; a stop that comes before the first shard costs an attempt and no more."""
    job = trainings["prepared"]
    job.wait()
    assert "attempt 0: stopped" in job.log
    assert job.last_line.endswith("attempt 1: finished")
    assert len(list((job.run / "cache").glob("*/meta.json"))) == 2  # training and held-out pairs


@uses("switched_off")
def test_kill_switch(trainings):
    job = trainings["switched_off"]
    job.wait()
    assert "attempt 0: stopped by" in job.last_line
    assert "remove it and submit again to go on" in job.last_line


@uses("killed", "undisturbed")
def test_killed_rank(trainings, undisturbed):
    job = trainings["killed"]
    job.wait()
    assert re.search(
        r"attempt 0: crashed, last checkpoint of step \d+: rank 1 on node\d ended with -9; requeued", job.log
    )
    assert_same_weights(job, undisturbed)


@uses("crashing")
def test_crash_that_repeats(trainings):
    job = trainings["crashing"]
    job.wait("FAILED")
    assert job.log.count("attempt 0: crashed") == 1
    # The other nodes were terminated for it: their 143, which srun ends with, is not the cause.
    assert re.fullmatch(
        rf"bdpo: job {job.id}, attempt 1: gave up after 2 attempts without progress: crashed, "
        r"last checkpoint of step 0: torchrun on node\d+ ended with 3: RuntimeError: broken for the test",
        job.last_line,
    )


@uses("refused")
def test_what_the_trainer_refuses_is_not_tried_again(trainings):
    job = trainings["refused"]
    job.wait("FAILED")
    assert "attempt 0: refused, not tried again: --pairs-per-step 1000 is more than" in job.last_line


@uses("undisturbed")
def test_lost_node(cluster, undisturbed):
    """After the others: its node is lost to all."""
    job = cluster.submit("lost", *FLAGS)
    job.wait_for_step(6)
    (lost,) = re.findall(r"attempt 0, train on node\[\d[-,](\d)\]", job.log)
    cluster.lab("kill-node", f"node{lost}")
    try:
        job.wait()
    finally:
        cluster.lab("start-node", f"node{lost}")
    assert re.search(r"attempt [12], train on node\S+: .*, step [5-9]", job.log)
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
