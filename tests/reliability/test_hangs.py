"""A rank that stands still: all ranks end soon, the cause is told, and the same command may be started again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.harness.jobs import DATA
from tests.harness.launching import torchrun

LIMIT = 3

#: Of which ten are for a launcher to end what does not end itself, and the rest for a machine with other work.
SECONDS = 60

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 512 --lr 1e-3 --train-iters 4 "
    "--pairs-per-step 8 --max-pairs 40 --tensor-model-parallel-size 2 --tokenizer-type SentencePieceTokenizer "
    "--tokenizer-workers 1 --save-interval 100"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "phase", "expected_cause"),
    [
        ("reads", 1, "step", "rank 1 ({host}) stood still in the phase 'step' for "),
        ("tokenizes", 0, "tokenizing", "rank 0 ({host}) stood still in the phase 'tokenizing' for "),
        ("holds", 1, "step", "rank 1 did not answer; in the phase 'step' the others have waited for "),
        ("freezes", 0, "step", "rank 0 did not answer; in the phase 'step' the others have waited for "),
    ],
)
def test_a_rank_that_stands_still_ends_the_job_with_its_cause(tmp_path, fault, rank, phase, expected_cause):
    save, told = tmp_path / "run", tmp_path / "told"
    flags = [*FLAGS.split(), "--tokenizer-model", str(DATA / "tokenizer.model")]
    flags += ["--pair-data", str(DATA / "train.jsonl"), "--save", str(save), "--phase-limit", f"{phase}={LIMIT}"]
    environment = {"FAILED_AT": str(tmp_path / "failed"), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
    environment |= {"BDPO_NOTIFY": f"bash -c 'echo $BDPO_STATE, $BDPO_CAUSE > {told}'"}
    job = Path(__file__).with_name("faulty_job.py")
    ended = torchrun(2, job, [fault, str(rank), *flags], tmp_path, **environment)
    seconds = time.time() - float((tmp_path / "failed").read_text())
    assert ended.returncode != 0
    assert seconds < SECONDS, f"{seconds:.0f} s after the fault"

    cause = expected_cause.format(host=os.uname().nodename)
    assert ended.stderr.count(f"error: {cause}") == 1, ended.stderr
    status = json.loads((save / "status.json").read_text())
    assert (status["state"], status["phase"]) == ("hung", phase)
    assert status["reason"].startswith(cause) and f"(limit {LIMIT} s)" in status["reason"]
    assert told.read_text() == f"hung, {status['reason']}\n"

    (stacks,) = save.glob("hang-*")
    answering = {0, 1} - ({rank} if "did not answer" in cause else set())
    assert {file.name for file in stacks.iterdir()} == {f"rank-{each:05}.txt" for each in answering}
    if fault == "holds":  # no Python runs in it: C has told
        assert "Timeout (" in ended.stderr and 'faulty_job.py", line' in ended.stderr, ended.stderr
    elif fault != "freezes":
        assert "faulty_job.py" in (stacks / f"rank-{rank:05}.txt").read_text()
