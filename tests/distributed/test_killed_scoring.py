"""A scoring job that is killed goes on where it was, and ends with the numbers of one that was not."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.training.reference.cache import open_scores
from tests.distributed.test_scoring import score_and_write_each_call
from tests.harness.jobs import DATA, score
from tests.harness.ranks import RankPool

KILLS, PAIRS = 10, 48
PATIENCE = 120.0

#: What torchrun runs in the place of the module: that, with a part for every call, and one block in a call.
WRITE_EACH_CALL = (
    "from megatron_bdpo.platform.boot import prepare_platform; prepare_platform();"
    "from megatron_bdpo.training.reference import scoring_loop as p; p.FLUSH_SECONDS = -1e9; p._CALL_SECONDS = 0;"
    "from megatron_bdpo.training.entry import score_main; score_main()"
)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """A warm process that has run no job yet, to fork jobs from."""
    pool = RankPool(1, tmp_path_factory.mktemp("nursery"))
    yield pool
    pool.close()


def parts(directory: Path) -> dict[str, tuple[int, int]]:
    """What is on disk: name -> what changes when the file is written again."""
    files = {path.name: path.stat() for path in directory.glob("part-*.safetensors")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in files.items()}


def tree(world_size: int, cache: Path, scores: Path):
    from tests.harness.killing import JobTree

    flags = ["--reference-cache", str(scores)]
    return JobTree(world_size, functools.partial(score_and_write_each_call, flags, pair_cache_dir=str(cache)))


def kill_again_and_again(world_size: int, cache: Path, scores: Path, seed: int) -> list[int]:
    """In the nursery. Kill the job at random moments of its life, then let it end. Returns parts after each time."""
    rng = random.Random(seed)
    start = time.monotonic()
    assert tree(world_size, cache, scores.parent / "measured").wait() == 0
    life = time.monotonic() - start
    seen: dict[str, tuple[int, int]] = {}
    counts = []
    for kill in range(KILLS):
        job, start = tree(world_size, cache, scores), time.monotonic()
        # Every other time at any moment, start and end included; always before many parts more are done.
        moment = start + (rng.uniform(0, life) if kill % 2 else PATIENCE)
        while time.monotonic() < moment and len(parts(scores / "train")) <= len(seen) and not job.ended():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))  # a part takes about as long
        job.kill()
        now = parts(scores / "train")
        assert seen.items() <= now.items(), "what was on disk was written again"
        seen = now
        counts.append(len(seen))
    assert tree(world_size, cache, scores).wait() == 0
    assert seen.items() <= parts(scores / "train").items(), "what was on disk was written again"
    return counts


@pytest.mark.slow
def test_a_job_killed_ten_times_ends_with_the_same_scores(nursery, tmp_path):
    (counts,) = nursery(kill_again_and_again, 2, tmp_path / "cache", tmp_path / "scores", seed=2)
    found, expected = tmp_path / "scores" / "train", tmp_path / "measured" / "train"
    names = sorted(parts(expected))
    assert len({count for count in counts if 0 < count < len(names)}) >= 2, f"killed too late or too early: {counts}"
    assert sorted(parts(found)) == names and len(open_scores(found)) == PAIRS
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    for name in ("conditional", "unconditional", "tokens", "row"):
        assert np.array_equal(getattr(open_scores(found), name), getattr(open_scores(expected), name)), name


def two_at_once(cache: Path, scores: Path) -> list[int]:
    """In the nursery. Exit codes of two jobs that fill one directory."""
    jobs = [tree(1, cache, scores) for _ in range(2)]
    return [job.wait() for job in jobs]


def test_two_jobs_may_fill_one_directory(nursery, tmp_path):
    assert nursery(two_at_once, tmp_path / "cache", tmp_path / "scores") == [[0, 0]]
    found = open_scores(tmp_path / "scores" / "train")
    assert len(found) == 48 and np.isfinite(found.conditional).all() and np.isfinite(found.unconditional).all()
    assert not list((tmp_path / "scores" / "train").glob(".*.partial"))


SLOW = 0.6
"""Seconds that a pack takes below: a second one would not fit into a call."""


def score_slowly_and_ask(flags, *, at_pack: int, rank: int, **overrides) -> tuple[float, int]:
    """On a rank: at its so many-th pack ``rank`` gets SIGTERM. Seconds from then to the end, and packs in all."""
    from unittest import mock

    import torch

    from megatron_bdpo.training import forward
    from megatron_bdpo.training.stopping import StopRequested

    inner, packs = forward.score_pack, []

    def slow(*args):
        packs.append(time.monotonic())
        if len(packs) == at_pack and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SLOW)
        return inner(*args)

    with mock.patch.object(forward, "score_pack", slow), pytest.raises(StopRequested):
        score(flags, **overrides)
    return time.monotonic() - packs[at_pack - 1], len(packs)


@pytest.mark.parametrize(
    ("layout", "rank", "packs_of_a_call"),
    [(["--tensor-model-parallel-size", "2"], 1, 1), (["--pipeline-model-parallel-size", "2"], 0, 4), ([], 1, 1)],
    ids=["TP2", "PP2", "DP2"],
)
def test_a_stop_is_heard_after_the_call_of_the_model(ranks, tmp_path, layout, rank, packs_of_a_call):
    """By all ranks, whichever is asked; what is scored is on disk, and the same command goes on to the same bits."""
    job = {"pair_cache_dir": str(tmp_path), "max_pairs": 24}
    flags = [*layout, "--reference-cache", str(tmp_path / "stopped")]
    seen = ranks(2)(score_slowly_and_ask, flags, at_pack=3, rank=rank, **job)
    for seconds, packs in seen:
        assert 3 <= packs <= 2 + packs_of_a_call
        assert seconds < packs_of_a_call * SLOW + 3, "5 s and a pack is what is promised"
    stopped = open_scores(tmp_path / "stopped" / "train", unfinished=True)
    some = np.isfinite(stopped.conditional).all(axis=1)
    assert 0 < some.sum() < 24
    for name in ("stopped", "undisturbed"):
        ranks(2)(score, [*layout, "--reference-cache", str(tmp_path / name)], **job)
    found, expected = (open_scores(tmp_path / name / "train") for name in ("stopped", "undisturbed"))
    assert np.array_equal(found.conditional[some], stopped.conditional[some])
    assert np.array_equal(found.conditional, expected.conditional)
    assert np.array_equal(found.unconditional, expected.unconditional)
    assert found.manifest["jobs"][0]["groups"] < 48


@pytest.mark.slow
def test_torchrun_is_killed_and_started_again(tmp_path):
    """The whole way a user goes: launcher, module, two ranks."""
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 512 --tensor-model-parallel-size 2 "
        f"--tokenizer-type SentencePieceTokenizer --reference-cache {tmp_path}/scores "
        f"--pair-cache-dir {tmp_path}/cache --pair-data"
    ).split()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", WRITE_EACH_CALL]
    command += [*flags, str(DATA / "train.jsonl"), "--tokenizer-model", str(DATA / "tokenizer.model")]
    directory = tmp_path / "scores" / "train"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        while not parts(directory) and job.poll() is None:
            time.sleep(0.01)
        for process in (*_ranks_of(job.pid), job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        job.wait()
    before = parts(directory)
    assert before and len(open_scores(directory, unfinished=True)) == 396, (tmp_path / "log").read_text()
    assert np.isnan(open_scores(directory, unfinished=True).unconditional).any()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert before.items() <= parts(directory).items()
    assert "pairs/s" in ended.stdout
    assert np.isfinite(open_scores(directory).unconditional).all()


def _ranks_of(launcher: int) -> list[int]:
    """The processes that the launcher has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == launcher:
            found.append(int(status.parent.name))
    return found
