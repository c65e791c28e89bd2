"""A reference of other weights than the policy starts from: scored, resident and resumed as one that is the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.harness.jobs import last_stage, scores_in, train, whole_weights
from tests.harness.ranks import RankFailure

JOB = {"max_pairs": 16, "pairs_per_step": 8}
DPO = ["--preference-loss", "dpo", "--train-iters", "2"]


@pytest.fixture(scope="module")
def other(ranks, tmp_path_factory) -> Path:
    """A checkpoint of other weights, and what it gives the pairs."""
    directory = tmp_path_factory.mktemp("other")
    save = ["--save", str(directory / "run"), "--save-interval", "2"]
    ranks(1)(train, [*DPO, "--seed", "77", *save], pair_cache_dir=str(directory / "first"), **JOB)
    ranks(1)(
        train,
        [*DPO, "--pretrained-checkpoint", str(directory / "run")],
        pair_cache_dir=str(directory / "cache"),
        **JOB,
    )
    return directory


def steps(outcomes) -> list[dict[str, float]]:
    return [
        {name: value for name, value in step.items() if not name.startswith("throughput")}
        for step in last_stage(outcomes).steps
    ]


def test_the_named_model_is_what_scores(ranks, other, tmp_path):
    named = ["--reference-model", str(other / "run")]
    outcomes = ranks(2)(
        train, [*DPO, *named, "--tensor-model-parallel-size", "2"], pair_cache_dir=str(tmp_path / "cache"), **JOB
    )
    expected, found = scores_in(other / "cache").conditional, scores_in(tmp_path / "cache").conditional
    assert np.isfinite(found).all() and found == pytest.approx(expected, rel=1e-6)
    resident = ranks(1)(
        train, [*DPO, *named, "--reference", "resident"], pair_cache_dir=str(tmp_path / "resident"), **JOB
    )
    for step, other_step in zip(steps(resident), steps(outcomes), strict=True):
        assert step == pytest.approx(other_step, rel=1e-4, abs=1e-5)
    assert abs(steps(outcomes)[0]["rewards/margins"]) > 1e-6, "the policy is not its reference"


def test_a_resumed_run_keeps_it(ranks, other, tmp_path):
    flags = [*DPO, "--reference-model", str(other / "run"), "--lr-decay-iters", "4"]
    cache = {"pair_cache_dir": str(tmp_path / "cache")}
    whole = ranks(1)(train, [*flags, "--train-iters", "4"], **JOB, **cache)
    run = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "2"]
    ranks(1)(train, [*flags, *run, "--train-iters", "4", "--exit-interval", "2"], **JOB, **cache)
    resumed = ranks(1)(train, [*flags, *run, "--train-iters", "4"], **JOB, pair_cache_dir=str(tmp_path / "again"))
    found, expected = whole_weights(resumed), whole_weights(whole)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)

    named = flags.index("--reference-model") + 1
    flags[named] = shutil.copytree(other / "run", tmp_path / "moved")
    ranks(1)(train, [*map(str, flags), *run, "--train-iters", "4"], **JOB, **cache)
    flags[named] = tmp_path / "run"
    with pytest.raises(RankFailure, match="do not make the reference of the resumed"):
        ranks(1)(train, [*map(str, flags), *run, "--train-iters", "4"], **JOB, **cache)


def test_one_that_nobody_reads(ranks, other):
    for flags, words in (
        (["--preference-loss", "simpo"], "the loss has none"),
        (["--preference-loss", "dpo", "--reference", "columns"], "the rows bring its log-probs"),
    ):
        with pytest.raises(RankFailure, match=words):
            ranks(1)(train, [*flags, "--train-iters", "1", "--reference-model", str(other / "run")], **JOB)
