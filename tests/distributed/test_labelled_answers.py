"""Losses of labelled answers as jobs: evaluations, adapters, scoring ahead, a run that goes on, what a run leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_bdpo.training.reference.cache import open_scores
from tests.harness.jobs import DATA, last_stage, score, train, whole_weights
from tests.harness.ranks import RankFailure

ROWS = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    """One answer of each of the example's pairs."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[:ROWS]]
    made = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if place % 3 else "rejected"], "label": place % 3 > 0}
        for place, pair in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return str(path)


def job(rows: str, **overrides):
    return {"pair_data": [rows], "max_pairs": None, "train_iters": 4, "lr": 1e-2} | overrides


@pytest.mark.parametrize("loss", ["kto", "bco"])
@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2", "--reference", "resident"]], ids=["whole", "adapters"])
def test_a_run_that_goes_on_takes_the_same_steps(ranks, tmp_path, rows, loss, flags):
    flags = ["--preference-loss", loss, "--eval-interval", "2", *flags]
    held_out = {"eval_share": 0.25}
    once = ranks(2)(train, flags, **job(rows, **held_out))
    kept = [*flags, "--save", str(tmp_path), "--save-interval", "2", "--load", str(tmp_path)]
    ranks(2)(train, [*kept, "--exit-interval", "2"], **job(rows, **held_out))
    again = ranks(2)(train, kept, **job(rows, **held_out))
    assert last_stage(again).steps[-1] | _TIMES == last_stage(once).steps[-1] | _TIMES
    assert last_stage(again).evaluations[-1] == last_stage(once).evaluations[-1]
    expected, found = whole_weights(once), whole_weights(again)
    for name, weight in expected.items():
        assert np.array_equal(found[name], weight), name


_TIMES = {"throughput/pairs_per_second": 0.0, "throughput/tokens_per_second": 0.0}


def test_an_evaluation_has_an_estimate_of_its_own(ranks, rows):
    """Over all that is held out, whatever the layout; at the start policy and reference are one."""
    flags = ["--preference-loss", "kto", "--eval-at-start", "--eval-interval", "2"]
    found = [last_stage(ranks(n)(train, flags, **job(rows, eval_share=0.25))).evaluations for n in (1, 2)]
    assert found[0][0]["kl"] == pytest.approx(0, abs=1e-4) and found[0][0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert found[0][-1]["kl"] > 1e-3
    for one, two in zip(*found, strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_the_mean_reward_is_that_of_what_is_looked_at(ranks, rows):
    """Of the step's answers, or of those held out; after their own prompts both are among the metrics."""
    found = last_stage(
        ranks(2)(train, ["--preference-loss", "bco", "--eval-interval", "2"], **job(rows, eval_share=0.25))
    )
    assert found.evaluations[-1]["delta"] != pytest.approx(found.steps[-1]["delta"], rel=1e-2)
    for metrics in (*found.steps, *found.evaluations):
        mean = sum(metrics[f"pairs/{side}"] * metrics[f"rewards/{side}"] for side in ("chosen", "rejected"))
        assert metrics["delta"] == pytest.approx(mean, rel=1e-3, abs=1e-5)


def test_scoring_ahead_is_what_training_finds(ranks, tmp_path, rows):
    """The log-probs after other prompts too; training then scores nothing."""
    cache = ["--reference-cache", str(tmp_path / "scores"), "--preference-loss", "kto"]
    ranks(2)(score, cache, **job(rows))
    scores = open_scores(tmp_path / "scores" / "train")
    assert np.isfinite(scores.conditional).all() and np.isfinite(scores.mismatched).all()
    assert np.array_equal(scores.conditional[:, 0], scores.conditional[:, 1])
    assert (scores.conditional != scores.mismatched).all() and np.isnan(scores.unconditional).all()
    parts = sorted((tmp_path / "scores" / "train").iterdir())
    found = ranks(1)(train, cache, **job(rows))
    assert sorted((tmp_path / "scores" / "train").iterdir()) == parts
    fresh = ranks(1)(train, ["--preference-loss", "kto"], **job(rows))
    assert last_stage(found).steps[-1]["loss"] == pytest.approx(last_stage(fresh).steps[-1]["loss"], rel=1e-4)


def test_scores_of_another_loss_are_completed(ranks, tmp_path, rows):
    """KTO after BCO: what is missing is scored, and nothing twice."""
    cache = ["--reference-cache", str(tmp_path / "scores")]
    ranks(1)(score, [*cache, "--preference-loss", "bco"], **job(rows))
    before = open_scores(tmp_path / "scores" / "train")
    assert np.isnan(before.mismatched).all()
    ranks(1)(score, [*cache, "--preference-loss", "kto"], **job(rows))
    after = open_scores(tmp_path / "scores" / "train")
    assert np.array_equal(after.conditional, before.conditional) and np.isfinite(after.mismatched).all()
    assert [each["groups"] for each in after.manifest["jobs"]] == [ROWS, ROWS]
    assert after.manifest["complete"]["scored"] == {"conditional": ROWS, "unconditional": 0, "mismatched": ROWS}


def test_what_a_run_leaves(ranks, tmp_path, rows):
    flags = ["--preference-loss", "kto", "--save", str(tmp_path), "--eval-interval", "2", "--save-interval", "4"]
    found = last_stage(ranks(1)(train, flags, **job(rows, eval_share=0.25)))
    lines = [json.loads(line) for line in (tmp_path / "heldout_rewards.jsonl").read_text("utf-8").splitlines()]
    for chosen, rejected in zip(lines[-1]["chosen"], lines[-1]["rejected"], strict=True):
        assert (chosen is None) != (rejected is None), "an answer has the reward of its label"
    for side in ("chosen", "rejected"):
        rewards = [reward for reward in lines[-1][side] if reward is not None]
        assert [reward is not None for reward in lines[-1][side]] == [each > 0 for each in lines[-1][f"{side}_tokens"]]
        assert np.mean(rewards) == pytest.approx(found.evaluations[-1][f"rewards/{side}"], rel=1e-5)


def test_columns_bring_no_log_probs_after_other_prompts(ranks, rows):
    with pytest.raises(RankFailure, match="--preference-loss kto reads those after other prompts too"):
        ranks(1)(train, ["--preference-loss", "kto", "--reference", "columns"], **job(rows))
