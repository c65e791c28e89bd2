"""Losses that look at whole steps, as jobs: evaluations without, adapters, a run that goes on."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from tests.harness.jobs import DATA, last_stage, train, whole_weights


@pytest.fixture
def pairs(tmp_path) -> str:
    """Rows with the log-probs of a reference that orders them otherwise than the policy."""
    path, generator = tmp_path / "pairs.jsonl", random.Random(0)
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[:20]]
    for row in rows:
        row |= {f"ref_{name}_logps": -generator.uniform(50, 500) for name in ("chosen", "rejected")}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_an_evaluation_is_dpos_and_a_step_is_not(ranks, pairs):
    flags = ["--reference", "columns", "--no-step-zero-check", "--eval-at-start", "--eval-interval", "2"]
    job = {"pair_data": (pairs,), "eval_share": 0.3, "train_iters": 2}
    aot, dpo = (last_stage(ranks(2)(train, [*flags, "--preference-loss", loss], **job)) for loss in ("aot", "dpo"))
    assert aot.evaluations[0]["loss"] == pytest.approx(dpo.evaluations[0]["loss"], rel=1e-6)
    assert abs(aot.steps[0]["loss"] - dpo.steps[0]["loss"]) > 0.01
    assert aot.steps[0]["rewards/margins"] == pytest.approx(dpo.steps[0]["rewards/margins"], rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2", "--reference", "resident"]], ids=["whole", "adapters"])
def test_a_run_that_goes_on_takes_the_same_steps(ranks, tmp_path, flags):
    flags = ["--preference-loss", "aot_unpaired", *flags]
    once = ranks(2)(train, flags, train_iters=4)
    kept = [*flags, "--save", str(tmp_path), "--save-interval", "2", "--load", str(tmp_path)]
    ranks(2)(train, [*kept, "--exit-interval", "2"], train_iters=4)
    again = ranks(2)(train, kept, train_iters=4)
    assert last_stage(again).steps[-1]["loss"] == last_stage(once).steps[-1]["loss"]
    expected, found = whole_weights(once), whole_weights(again)
    for name, weight in expected.items():
        assert np.array_equal(found[name], weight), name
