"""Jobs on rows of several answers, beside the same jobs on their pairs: references, held-out pairs, resuming."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.training.reference.cache import open_scores
from megatron_bdpo.training.reporting.heldout_file import NAME, read_heldout
from tests.distributed.test_bad_input import assert_refused, refusal
from tests.harness.jobs import last_stage, score, train
from tests.parity.test_groups import PAIRS, UNSAFE_BOTH, pairs_of, rows

DP2 = 2
JOB = {"max_pairs": None, "train_iters": 2, "pairs_per_step": 8}
ALL = ["--pairs-from", "all"]
OVER_PAIRS = [*ALL, "--mean-over", "pairs"]


def written(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return str(path)


@pytest.fixture
def groups(tmp_path) -> dict[str, Any]:
    return JOB | {"pair_data": [written(tmp_path / "groups.jsonl", rows())], "pair_cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def pairs(tmp_path) -> dict[str, Any]:
    """All of them in every step, as the groups are."""
    made = [pair for row in rows() for pair in pairs_of(row)]
    data = {"pair_data": [written(tmp_path / "pairs.jsonl", made)], "pair_cache_dir": str(tmp_path / "cache")}
    return JOB | data | {"pairs_per_step": len(made)}


def told(outcomes) -> list[dict[str, float]]:
    """The metrics of the steps."""
    return [
        {name: value for name, value in step.items() if not name.startswith(("throughput", "pairs_per_second"))}
        for step in last_stage(outcomes).steps
    ]


def scores_of(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    found = open_scores(directory)
    return found.conditional, found.unconditional


@pytest.mark.parametrize("flags", ["--preference-loss bdpo --log-entropy", "--objective reward"])
def test_all_metrics_are_those_of_the_pairs(ranks, groups, pairs, flags):
    expected = told(ranks(1)(train, flags.split(), **pairs))
    found = told(ranks(DP2)(train, [*flags.split(), *OVER_PAIRS], **groups))
    for step, expected_step in zip(found, expected, strict=True):
        assert step.keys() == expected_step.keys()
        for name in expected_step:
            assert step[name] == pytest.approx(expected_step[name], rel=2e-4, abs=1e-5), name


def test_scores_of_which_groups_lack_some_are_completed(ranks, groups, tmp_path):
    """SafeDPO leaves pairs out, a limit cuts the last group: what is missing is scored, in groups, and nothing else."""
    cache = ["--reference-cache", str(tmp_path / "scores"), *ALL]
    alone = ["--reference-cache", str(tmp_path / "alone"), *ALL]
    ((expected,),) = ranks(1)(score, ["--preference-loss", "bdpo", *alone], **groups)
    ((directory,),) = ranks(1)(
        score, ["--preference-loss", "safedpo", *cache], **groups | {"max_pairs": 12, "pairs_per_step": 2}
    )
    few = scores_of(directory)[0]
    assert np.isfinite(few).all(axis=1).sum() < 12 == len(few), "pairs that are unsafe both ways are left out"
    ((directory,),) = ranks(1)(score, ["--preference-loss", "safedpo", *cache], **groups)
    conditional, unconditional = scores_of(directory)
    assert np.isfinite(conditional).all(axis=1).sum() == PAIRS - UNSAFE_BOTH and not np.isfinite(unconditional).any()
    ranks(DP2)(score, ["--preference-loss", "bdpo", *cache], **groups)
    for found, whole in zip(scores_of(directory), scores_of(expected), strict=True):
        assert np.allclose(found, whole, rtol=1e-5, atol=1e-5) and len(found) == PAIRS
    known = np.isfinite(conditional).all(axis=1)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert known.sum() == PAIRS - UNSAFE_BOTH and manifest["identity"]["pairs_from"] == "all"


def test_log_probs_of_answers_train_as_scores_do(ranks, groups, tmp_path):
    """``ref_responses_logps``, each once in its row, however many pairs it is in."""
    flags = ["--preference-loss", "dpo", *ALL]
    expected = told(ranks(1)(train, flags, **groups))
    (manifest,) = (tmp_path / "cache").glob("**/manifest.json")
    found = open_scores(manifest.parent)
    values, place = rows(), 0
    for row in values:
        row["ref_responses_logps"] = [0.0] * len(row["responses"])
        for pair in pairs_of(row):
            for side, value in zip(("chosen", "rejected"), found.conditional[place].tolist(), strict=True):
                row["ref_responses_logps"][row["responses"].index(pair[side])] = value
            place += 1
    data = {"pair_data": [written(tmp_path / "known.jsonl", values)]}
    assert told(ranks(1)(train, [*flags, "--reference", "columns"], **groups | data)) == expected
    values[2]["ref_responses_logps"][1] = None
    data = {"pair_data": [written(tmp_path / "unknown.jsonl", values)]}
    refused = ranks(1)(refusal, [*flags, "--reference", "columns"], **groups | data)
    assert_refused(refused, f"3 of {PAIRS} pairs bring no log-probs .*line 3")


def test_held_out_groups(ranks, groups, pairs, tmp_path):
    """All pairs of them are evaluated, and kept; a share holds out whole rows."""
    evaluated = ["--preference-loss", "dpo", "--eval-interval", "1", "--save-interval", "2"]
    data = {"eval_pair_data": groups["pair_data"]}
    ranks(DP2)(train, [*evaluated, *OVER_PAIRS, "--save", str(tmp_path / "groups")], **groups | data)
    data = {"eval_pair_data": pairs["pair_data"]}
    (outcome,) = ranks(1)(train, [*evaluated, "--save", str(tmp_path / "pairs")], **pairs | data)
    found, expected = (read_heldout(tmp_path / name / NAME)[-1] for name in ("groups", "pairs"))
    assert np.array_equal(found.pairs, PAIRS + np.arange(PAIRS)) and np.array_equal(found.tokens, expected.tokens)
    assert np.allclose(found.rewards, expected.rewards, rtol=1e-3, atol=1e-5)
    margin = outcome.evaluations[-1]["rewards/margins"]
    assert (found.rewards[:, 0] - found.rewards[:, 1]).mean() == pytest.approx(margin, rel=1e-3, abs=1e-6)

    share = [*evaluated, *ALL, "--eval-share", "0.25", "--save", str(tmp_path / "share")]
    ranks(1)(train, share, **groups | {"pairs_per_step": 6})
    firsts = np.cumsum([0, *(len(pairs_of(row)) for row in rows())])
    held_out = read_heldout(tmp_path / "share" / NAME)[-1].pairs
    whole = [np.arange(start, stop) for start, stop in itertools.pairwise(firsts) if start in held_out]
    assert len(whole) == 2 and np.array_equal(held_out, np.concatenate(whole))


def test_a_run_goes_on_in_its_groups(ranks, groups, tmp_path):
    flags = ["--preference-loss", "bdpo", *ALL, "--pairs-per-step", "3", "--lr-decay-style", "constant"]
    expected = told(ranks(1)(train, flags, **groups | {"train_iters": 4}))
    saved = [*flags, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "2"]
    first = told(ranks(1)(train, [*saved, "--exit-interval", "2"], **groups | {"train_iters": 4}))
    assert first + told(ranks(1)(train, saved, **groups | {"train_iters": 4})) == expected
    refused = ranks(1)(refusal, [*saved, "--pairs-from", "adjacent"], **groups | {"train_iters": 5})
    assert_refused(refused, "other data|data")


def test_a_mean_that_makes_no_difference_is_refused(ranks, groups, pairs):
    for over in ("groups", "pairs"):
        refused = ranks(1)(refusal, ["--mean-over", over], **pairs)
        assert_refused(refused, f"--mean-over {over} makes no difference: no row gives several pairs")
    assert_refused(ranks(1)(refusal, ["--mean-over", "pairs"], **groups), "no row gives several pairs")
    steps = [*ALL, "--pairs-per-step", "9"]
    assert_refused(ranks(1)(refusal, steps, **groups), "more than the 8 usable groups of an epoch")


def test_two_weighted_sources_of_groups(ranks, tmp_path):
    """A weight says how often a source's groups are drawn: of twelve steps of one, four and eight."""
    made = [row for row in rows() if len(row["responses"]) > 2]
    names = [written(tmp_path / f"{name}.jsonl", part) for name, part in (("a", made[:2]), ("b", made[2:4]))]
    job = JOB | {"pair_cache_dir": str(tmp_path / "cache"), "pairs_per_step": 1, "train_iters": 6}
    seen = ranks(1)(drawn_pairs, [*ALL, "--preference-loss", "simpo"], **job, pair_data=["1", names[0], "2", names[1]])
    sizes = [len(pairs_of(row)) for row in made[:4]]
    firsts = np.cumsum([0, *sizes])
    assert sorted(seen[0]) == sorted(
        [list(range(start, stop)) for start, stop in itertools.pairwise(firsts)]
        + [list(range(start, stop)) for start, stop in itertools.pairwise(firsts[2:])]
    )


def test_packs_are_dealt_out_by_their_attention(ranks, groups):
    """A row of many short answers is cheaper than one of the same positions with two long ones."""
    for flags in (["--preference-loss", "simpo"], ["--preference-loss", "simpo", "--no-share-prompts"]):
        (found,) = ranks(1)(costs_of_plan, [*flags, *ALL], **groups)
        assert found["costs"] == found["by keys seen"] and len({*found["costs"]}) > 4


def costs_of_plan(flags: list[str], **overrides: Any) -> dict[str, list[int]]:
    """What the plan takes the groups' attention to cost, and what packs of one group each say of it."""
    from unittest import mock

    from megatron_bdpo.data.context import keys_seen
    from megatron_bdpo.data.packs import lay_out
    from megatron_bdpo.training import build_job
    from tests.harness.jobs import run_job

    with mock.patch.object(build_job, "plan_steps", wraps=build_job.plan_steps) as plan:
        run, _ = run_job(flags, overrides)
    pool, share = run.job.pool, run.job.share_prompts
    packs = [
        lay_out([pool.group(each).group], int(run.job.sizes[each]), share_prompts=share)
        for each in range(len(pool.grouping))
    ]
    # n tokens of a sequence see n (n + 1) / 2 keys.
    by_keys = [2 * int(keys_seen(pack).sum()) - pack.used for pack in packs]
    return {"costs": plan.call_args.kwargs["costs"].tolist(), "by keys seen": by_keys}


def drawn_pairs(flags: list[str], **overrides: Any) -> list[list[int]]:
    """The pairs of each step."""
    from tests.harness.jobs import run_job

    run, _ = run_job(flags, overrides)
    return [run.job.pool.grouping.pairs_of(groups).tolist() for groups in run.job.plan.steps]
