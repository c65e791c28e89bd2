"""The rewards of each held-out pair: every pair once and the same in every layout, and one series over resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.report.heldout import Evaluated
from megatron_bdpo.training.reporting.heldout_file import NAME, HeldOutRewards, read_heldout
from tests.harness.jobs import train

HELD_OUT = ["--eval-share", "0.4", "--eval-interval", "1", "--eval-at-start"]
JOB = {"max_pairs": 28, "pairs_per_step": 4, "train_iters": 2, "preference_loss": "dpo"}
PAIRS = 11
LAYOUTS = {
    "TP2 PP2 VPP": (
        4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "DP2 CP2": (4, "--context-parallel-size 2"),
    "DP2, resident reference": (2, "--reference resident"),
}  # fmt: skip


def kept(run: Path) -> list[HeldOutRewards]:
    return read_heldout(run / NAME)


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> list[HeldOutRewards]:
    """Of one process: what is kept has the means that the run has reported."""
    run = tmp_path_factory.mktemp("alone")
    (outcome,) = ranks(1)(train, [*HELD_OUT, "--save", str(run), "--save-interval", "2"], **JOB)
    first, last = kept(run)
    for found, reported in ((first, outcome.evaluations[0]), (last, outcome.evaluations[-1])):
        assert found.step == reported["iteration"] and len(np.unique(found.pairs)) == len(found.pairs) == PAIRS
        margins = found.rewards[:, 0] - found.rewards[:, 1]
        means = [margins.mean(), *found.rewards.mean(axis=0)]
        expected = [reported[f"rewards/{name}"] for name in ("margins", "chosen", "rejected")]
        assert np.allclose(means, expected, rtol=1e-5, atol=1e-6)
        assert Evaluated.of(found).right == pytest.approx(reported["rewards/accuracies"])
    assert np.abs(first.rewards).max() < 1e-5 < np.abs(last.rewards).min()
    assert main(["report", str(run), "--text-only"]) == 0
    return [first, last]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_what_one_process_keeps(ranks, tmp_path, alone, layout):
    world_size, flags = LAYOUTS[layout]
    ranks(world_size)(train, [*HELD_OUT, *flags.split(), "--save", str(tmp_path), "--save-interval", "2"], **JOB)
    for found, expected in zip(kept(tmp_path), alone, strict=True):
        assert found.step == expected.step
        assert np.array_equal(found.pairs, expected.pairs) and np.array_equal(found.tokens, expected.tokens)
        assert np.allclose(found.rewards, expected.rewards, rtol=1e-3, atol=1e-5)


def test_a_reward_model_has_them_too(ranks, tmp_path):
    flags = [*HELD_OUT, "--objective", "reward", "--save", str(tmp_path), "--save-interval", "2"]
    job = {name: value for name, value in JOB.items() if name != "preference_loss"}
    outcome = ranks(2)(train, flags, **job)[-1]
    last = kept(tmp_path)[-1]
    assert len(last.pairs) == PAIRS
    assert np.allclose(last.rewards.mean(axis=0)[0], outcome.evaluations[-1]["rewards/chosen"], rtol=1e-5)
    assert main(["report", str(tmp_path), "--text-only"]) == 0


def test_a_resumed_run_forgets_what_it_does_again(ranks, tmp_path):
    flags = [*HELD_OUT, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    ranks(2)(train, flags, **JOB)
    expected = kept(tmp_path)
    assert [found.step for found in expected] == [0, 2]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")  # as if it had been killed in step 2
    ranks(2)(train, flags, **(JOB | {"train_iters": 1}))
    assert [found.step for found in kept(tmp_path)] == [0, 1]
    ranks(2)(train, flags, **JOB)
    again = kept(tmp_path)
    assert [found.step for found in again] == [0, 2]
    assert all(np.array_equal(one.rewards, other.rewards) for one, other in zip(again, expected, strict=True))
    ranks(2)(train, ["--save", str(tmp_path), "--overwrite", "--save-interval", "2"], **JOB)  # another run, with none
    assert kept(tmp_path) == []


def test_without_held_out_pairs_there_is_no_file(ranks, tmp_path):
    ranks(1)(train, ["--save", str(tmp_path), "--save-interval", "2"], **JOB)
    assert not (tmp_path / NAME).exists()
