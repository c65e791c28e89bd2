"""One of several ranks fails alone: all stop soon, and its cause is told once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.harness.jobs import DATA
from tests.harness.launching import torchrun

SECONDS = 30

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 512 --lr 1e-3 --train-iters 4 "
    "--pairs-per-step 8 --max-pairs 40 --tensor-model-parallel-size 2 --tokenizer-type SentencePieceTokenizer"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "ranks", "expected"),
    [
        ("raises", 4, "RuntimeError: THE FIRST CAUSE"),  # one waits for it in its tensor group, one in its data group
        ("bad data", 2, "error (rank 1): pairs.jsonl, line 17: THE FIRST CAUSE"),
        ("dies", 4, ""),
    ],
)
def test_all_ranks_stop_and_the_first_cause_is_shown_once(tmp_path, fault, ranks, expected):
    flags = [*FLAGS.split(), "--tokenizer-model", str(DATA / "tokenizer.model")]
    flags += ["--pair-data", str(DATA / "train.jsonl"), "--pair-cache-dir", str(tmp_path / "cache")]
    failed = tmp_path / "failed"
    job = Path(__file__).with_name("faulty_job.py")
    ended = torchrun(ranks, job, [fault, str(ranks // 2), *flags], tmp_path, FAILED_AT=str(failed))
    seconds = time.time() - float(failed.read_text())
    assert ended.returncode != 0
    assert seconds < SECONDS, f"{seconds:.0f} s after the fault"
    ours = ended.stderr.split("torch/distributed/elastic")[0]  # the launcher adds a summary and a traceback of its own
    # Of one that was killed nobody tells, but that its connection is closed one of the others may, before it is ended.
    assert ours.count("Traceback") in {"raises": {1}, "bad data": {0}, "dies": {0, 1}}[fault], ours
    if expected:
        assert ended.stderr.count(": THE FIRST CAUSE") == 1, ended.stderr
        assert expected in ended.stderr, ended.stderr
