"""--eval-share as a job: all answers to a prompt on one side, the same ones in every layout and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.jobs import DATA, last_stage, run_job, train
from tests.harness.ranks import RankFailure

JOB = {"max_pairs": None, "train_iters": 4, "preference_loss": "kto", "eval_share": 0.25, "eval_interval": 2}
HELD_OUT = 11  # of 43 rows


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Of each row: 8 prompts of four answers, in two places of the file, and 11 of one."""
    known = [json.loads(line)["prompt"] for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()]
    known = list(dict.fromkeys(known))[:19]
    return [*known[:8], *known[:8], *known, *known[:8]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, prompts) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [
        {"prompt": prompt, "completion": f"Answer {place}, in a few words.", "label": place % 3 > 0}
        for place, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return str(path)


def sides(flags: list[str], **overrides) -> tuple[set[int], set[int]]:
    """Rows that this rank's job has trained on, by its steps, and those that it has held out."""
    run, _ = run_job(flags, overrides)
    pool = run.job.pool
    trained, held_out = (pool.grouping.pairs_of(ids) for ids in (run.job.plan.steps.ravel(), run.job.held_out.ids))
    assert set(run.job.train.ids.tolist()) >= set(run.job.plan.steps.ravel().tolist())
    return {int(pool.origin(pair)[1]) for pair in trained}, {int(pool.origin(pair)[1]) for pair in held_out}


def test_no_answer_to_a_held_out_prompt_is_trained_on(ranks, rows, prompts):
    (alone,) = ranks(1)(sides, [], pair_data=[rows], pairs_per_step=8, **JOB)
    trained, held_out = alone
    assert len(trained) == len(prompts) - HELD_OUT and len(held_out) == HELD_OUT
    of_prompts = [{prompts[row - 1] for row in side} for side in alone]
    assert of_prompts[0].isdisjoint(of_prompts[1])
    layouts = {2: [], 4: ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]}
    for count, flags in layouts.items():
        assert ranks(count)(sides, flags, pair_data=[rows], pairs_per_step=8, **JOB) == [alone] * count


def test_seeds_share_a_split_and_a_run_goes_on_with_its_own(ranks, tmp_path, rows):
    """Also where no prompt repeats, so that its numbers and --seed alone do not tell it."""
    ((_, first), (_, second), (_, other)) = (
        ranks(1)(sides, [], pair_data=[rows], pairs_per_step=8, eval_seed=own, seed=seed, **JOB)[0]
        for own, seed in ((5, 1), (5, 2), (None, 2))
    )
    assert first == second != other
    flags = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    job = JOB | {"preference_loss": "dpo", "max_pairs": 16}
    ranks(1)(train, [*flags, "--exit-interval", "2"], eval_seed=5, **job)
    with pytest.raises(RankFailure, match=r"that run held out other prompts\..* Give its --eval-share and --eval-seed"):
        ranks(1)(train, flags, eval_seed=6, **job)
    assert [step["iteration"] for step in last_stage(ranks(1)(train, flags, eval_seed=5, **job)).steps] == [3, 4]


def by_rows(flags: list[str], **overrides):
    """Train as runs did before prompts were kept together."""
    from unittest import mock

    import numpy as np

    from megatron_bdpo.training import build_job

    split = build_job.hold_out

    def without_prompts(groups, prompts, share, seed):
        return split(groups, np.arange(len(groups), dtype=np.uint64), share, seed)

    with mock.patch.object(build_job, "hold_out", without_prompts):
        return train(flags, **overrides)


def test_a_run_goes_on_with_its_split(ranks, tmp_path, rows):
    flags = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    job = JOB | {"pair_data": [rows]}
    ranks(1)(train, [*flags, "--exit-interval", "2"], **job)
    assert [step["iteration"] for step in last_stage(ranks(2)(train, flags, **job)).steps] == [3, 4]


def test_a_run_that_began_with_the_older_rule_is_refused(ranks, tmp_path: Path, rows):
    """Unless no prompt repeats: then its split is this one."""
    flags = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    job = JOB | {"pair_data": [rows]}
    ranks(1)(by_rows, [*flags, "--exit-interval", "2"], **job)
    with pytest.raises(RankFailure, match=r"held out what its --seed drew, .* rows, not whole prompts\..*--finetune"):
        ranks(1)(train, flags, **job)
    assert len(last_stage(ranks(1)(train, [*flags, "--finetune"], **job)).steps) == 4
