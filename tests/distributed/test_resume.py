"""Stop at a checkpoint, start again: the rest of the run is the same to the bit, against the original reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.harness.jobs import last_stage, train, whole_weights
from tests.harness.ranks import RankFailure

STEPS = ["--train-iters", "4", "--save-interval", "2"]


def run_in_two_parts(ranks, world_size, directory: Path, flags):
    """Returns (uninterrupted, second part) outcomes."""
    whole, parts = directory / "whole", directory / "parts"
    uninterrupted = ranks(world_size)(train, [*STEPS, *flags, "--save", str(whole)])
    resume = [*STEPS, *flags, "--save", str(parts), "--load", str(parts)]
    first = ranks(world_size)(train, [*resume, "--exit-interval", "2"])
    assert first[0].exit_code == 0
    assert [step["iteration"] for step in last_stage(first).steps] == [1, 2]
    return uninterrupted, ranks(world_size)(train, resume)


def assert_bit_identical(uninterrupted, resumed):
    expected = last_stage(uninterrupted).steps[2:]
    steps = last_stage(resumed).steps
    assert [step["iteration"] for step in steps] == [3, 4]
    for step, expected_step in zip(steps, expected, strict=True):
        for name, expected_value in expected_step.items():
            assert name.startswith("throughput") or step[name] == expected_value, name
    weights, expected_weights = whole_weights(resumed), whole_weights(uninterrupted)
    assert weights.keys() == expected_weights.keys()
    for name, expected_value in expected_weights.items():
        assert np.array_equal(weights[name], expected_value), name


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_resumed_run_is_bit_identical(ranks, tmp_path, reference):
    assert_bit_identical(*run_in_two_parts(ranks, 1, tmp_path, ["--reference", reference]))


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_resumed_run_is_bit_identical_on_four_ranks(ranks, tmp_path, reference):
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    assert_bit_identical(*run_in_two_parts(ranks, 4, tmp_path, [*layout, "--reference", reference]))


def test_distributed_optimizer_resumes(ranks, tmp_path):
    assert_bit_identical(*run_in_two_parts(ranks, 2, tmp_path, ["--use-distributed-optimizer"]))


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_bf16_resumes_in_deterministic_mode(ranks, tmp_path, reference):
    """What is computed in bf16 is stored as it is, in fp32 main weights: nothing is rounded on the way."""
    flags = ["--bf16", "--deterministic-mode", "--use-distributed-optimizer", "--reference", reference]
    assert_bit_identical(*run_in_two_parts(ranks, 2, tmp_path, flags))
    assert ranks(2)(left_by_determinism) == [False, False], "the next run in these processes is its own"


def left_by_determinism() -> bool:
    import torch

    return torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_experts_resume(ranks, tmp_path, reference):
    experts = "--num-experts 4 --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall"
    layout = "--expert-model-parallel-size 2 --use-distributed-optimizer"
    flags = f"{experts} {layout} --reference {reference}".split()
    assert_bit_identical(*run_in_two_parts(ranks, 2, tmp_path, flags))


def test_context_parallel_run_resumes(ranks, tmp_path):
    flags = ["--context-parallel-size", "2", "--reference", "resident"]
    assert_bit_identical(*run_in_two_parts(ranks, 2, tmp_path, flags))


def test_both_reference_modes_train_the_same(ranks, tmp_path):
    runs = {
        mode: ranks(2)(train, ["--reference", mode, "--tensor-model-parallel-size", "2"], pair_cache_dir=str(tmp_path))
        for mode in ("precomputed", "resident")
    }
    for step, expected in zip(last_stage(runs["resident"]).steps, last_stage(runs["precomputed"]).steps, strict=True):
        for name, expected_value in expected.items():
            # A resident reference does not know the quartiles of imbalance beforehand.
            if not name.startswith("throughput") and "imbalance_q" not in name:
                assert step[name] == pytest.approx(expected_value, rel=1e-5, abs=1e-4), name


def test_resume_in_another_layout_continues_at_the_same_pairs(ranks, tmp_path):
    """The position is the step, also in the learning rate's schedule: two ranks take up what one rank has left."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # One rank has three packs a step, two ranks have four: Megatron counts in packs.
    flags = [*STEPS, "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.3"]
    expected = ranks(1)(train, [*flags, "--save", str(whole)])
    resume = [*flags, "--save", str(parts), "--load", str(parts)]
    ranks(1)(train, [*resume, "--exit-interval", "2"])
    resumed = ranks(2)(train, resume)
    assert [step["iteration"] for step in last_stage(resumed).steps] == [3, 4]
    for step, expected_step in zip(last_stage(resumed).steps, last_stage(expected).steps[2:], strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-5)
        assert step["logps/chosen"] == pytest.approx(expected_step["logps/chosen"], rel=1e-5)
        assert step["learning_rate"] == expected_step["learning_rate"]


def test_reference_comes_back_when_its_cache_is_lost(ranks, tmp_path):
    """Started from a checkpoint, the reference can be scored again from that checkpoint, not from the policy."""
    import shutil

    start, run = tmp_path / "start", tmp_path / "run"
    ranks(1)(train, ["--train-iters", "1", "--save", str(start), "--save-interval", "1"])
    flags = [*STEPS, "--pretrained-checkpoint", str(start), "--load", str(run), "--save", str(run)]
    expected = ranks(1)(train, ["--train-iters", "4", "--pretrained-checkpoint", str(start)])
    ranks(1)(train, [*flags, "--exit-interval", "2"])
    for cache in (run / "cache").glob("reference-*"):
        shutil.rmtree(cache)
    resumed = ranks(1)(train, flags)
    for step, expected_step in zip(last_stage(resumed).steps, last_stage(expected).steps[2:], strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-6)
        assert step["rewards/chosen"] == pytest.approx(expected_step["rewards/chosen"], abs=1e-6)


#: A run that goes on for longer than it was to: Megatron wants to be told.
LONGER = ["--save-interval", "2", "--override-opt-param-scheduler"]


def test_weights_drawn_at_random_are_drawn_again_for_a_longer_run(ranks, tmp_path):
    """Scores of further pairs, after the policy has moved: those of a run that had them from the start."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = ranks(1)(train, ["--train-iters", "4", "--save", str(whole), "--save-interval", "2"])
    flags = [*LONGER, "--save", str(parts), "--load", str(parts), "--train-iters"]
    ranks(1)(train, [*flags, "2"])
    resumed = ranks(1)(train, [*flags, "4"])
    for step, expected_step in zip(last_stage(resumed).steps, last_stage(expected).steps[2:], strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-6)
        assert step["rewards/chosen"] == pytest.approx(expected_step["rewards/chosen"], abs=1e-6)


def test_other_weights_than_the_original_references_are_refused(ranks, tmp_path):
    """Here by another draw, as another version of the program would make it."""
    flags = [*LONGER, "--save", str(tmp_path), "--load", str(tmp_path), "--train-iters"]
    ranks(1)(train, [*flags, "2"])
    with pytest.raises(RankFailure, match="--seed 1234 and this run's settings do not make the reference"):
        ranks(1)(_train_with_other_draw, [*flags, "4"])


def _train_with_other_draw(flags):
    from unittest import mock

    from megatron_bdpo.model import initialization
    from megatron_bdpo.training.reference import provider

    with mock.patch.object(
        provider, "initialize_by_name", lambda model, seed: initialization.initialize_by_name(model, seed + 1)
    ):
        return train(flags)


# Runs of an earlier version, which told references apart by 46 of Megatron's arguments


def _as_an_earlier_version(function, *args):
    from unittest import mock

    from megatron_bdpo.training.reference import provider

    def identity(config, weights, scoring):
        named = {"num_layers": 4, "params_dtype": "torch.float32"}
        return {"weights": weights, "vocabulary": scoring.vocab_size, **named, "log_probs": scoring.kernel}

    with mock.patch.object(provider, "reference_identity", identity):
        return function(*args)


def _tell(function, *args):
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return function(*args), printed.getvalue()


def test_a_run_of_an_earlier_version_finds_its_reference(ranks, tmp_path):
    flags = [*STEPS, "--save", str(tmp_path), "--load", str(tmp_path)]
    ranks(1)(_as_an_earlier_version, train, [*flags, "--exit-interval", "2"])
    ((resumed, printed),) = ranks(1)(_tell, train, flags)
    assert [step["iteration"] for step in resumed.steps] == [3, 4]
    assert "0 of them scored now" in printed and "earlier version" not in printed
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 1


def test_the_reference_of_an_earlier_version_is_known_by_its_weights(ranks, tmp_path):
    """Where its weights are made again: here by --seed, for a run that goes on for longer."""
    expected = ranks(1)(train, ["--train-iters", "4"])
    flags = [*LONGER, "--save", str(tmp_path), "--load", str(tmp_path), "--train-iters"]
    ranks(1)(_as_an_earlier_version, train, [*flags, "2"])
    with pytest.raises(RankFailure, match=r"do not make the reference of the resumed checkpoint:\s+weights: \w+ there"):
        ranks(1)(_train_with_other_draw, [*flags, "4"])
    ((resumed, printed),) = ranks(1)(_tell, train, [*flags, "4"])
    assert "an earlier version began this run: the model's settings are not compared, its weights are" in printed
    for step, expected_step in zip(resumed.steps, last_stage(expected).steps[2:], strict=True):
        assert step["rewards/chosen"] == pytest.approx(expected_step["rewards/chosen"], abs=1e-6)


def test_the_reference_cache_of_an_earlier_version_is_refused(ranks, tmp_path):
    flags = ["--train-iters", "1", "--reference-cache", str(tmp_path / "reference")]
    ranks(1)(_as_an_earlier_version, train, flags)
    with pytest.raises(RankFailure, match="something else:\n  they were written by an earlier version of this program"):
        ranks(1)(train, flags)


def test_checkpoint_of_other_data_is_refused(ranks, tmp_path):
    flags = [*STEPS, "--save", str(tmp_path), "--load", str(tmp_path)]
    ranks(1)(train, [*flags, "--exit-interval", "2"])
    with pytest.raises(RankFailure, match=r"belongs to a run over other steps:\s+pairs_per_step: 8 there, 16 here"):
        ranks(1)(train, [*flags, "--pairs-per-step", "16"])


def test_changed_loss_on_resume_is_said(ranks, tmp_path):
    flags = [*STEPS, "--save", str(tmp_path), "--load", str(tmp_path)]
    ranks(1)(train, [*flags, "--exit-interval", "2"])
    resumed = ranks(1)(train, [*flags, "--beta", "0.3"])
    assert [step["iteration"] for step in last_stage(resumed).steps] == [3, 4]
