"""What a run reports: to TensorBoard, at evaluations, and with packs that hold nothing."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.harness.jobs import DATA, last_stage, train
from tests.harness.parity import assert_same_steps

HELD_OUT = ["--eval-pair-data", str(DATA / "heldout.jsonl"), "--eval-interval", "2", "--eval-at-start"]


def test_tensorboard_has_the_metrics_by_their_known_names(ranks, tmp_path):
    ranks(2)(train, [*HELD_OUT, "--tensorboard-dir", str(tmp_path / "tb")], pair_cache_dir=str(tmp_path))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    expected = {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "comprehension/chosen", "comprehension/rejected", "comprehension/imbalance",
        "weights/chosen", "weights/rejected", "scale", "throughput/pairs_per_second", "throughput/tokens_per_second",
        "loss validation", "rewards/accuracies validation",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("rewards/margins")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("rewards/margins validation")] == [0, 2, 3]


def test_evaluation_covers_all_held_out_pairs_on_every_layout(ranks, tmp_path):
    expected = last_stage(ranks(1)(train, HELD_OUT, pair_cache_dir=str(tmp_path / "1"))).evaluations
    assert [record["iteration"] for record in expected] == [0, 2, 3]
    for name, flags in {"dp": [], "tp": ["--tensor-model-parallel-size", "2"]}.items():
        found = last_stage(ranks(2)(train, [*HELD_OUT, *flags], pair_cache_dir=str(tmp_path / name))).evaluations
        assert_same_steps(found, expected)


def test_experts_are_evaluated_too(ranks, tmp_path):
    """After the last step as well, where no step follows whose tokens their auxiliary losses would be means over."""
    experts = ["--num-experts", "4", "--moe-aux-loss-coeff", "0.01"]
    outcome = last_stage(ranks(1)(train, [*HELD_OUT, *experts], pair_cache_dir=str(tmp_path)))
    assert [record["iteration"] for record in outcome.evaluations] == [0, 2, 3]


def test_share_held_out_from_training_data(ranks, tmp_path):
    outcome = last_stage(ranks(1)(train, ["--eval-share", "0.25", "--eval-at-start"], pair_cache_dir=str(tmp_path)))
    assert len(outcome.evaluations) == 2


@pytest.mark.parametrize("pairs", ["3", "5"])
def test_ranks_with_uneven_and_empty_packs_agree_with_one_rank(ranks, tmp_path, pairs):
    """Each pair counts once, wherever it is: the step is the mean over its pairs, not over packs or ranks."""
    flags = ["--pairs-per-step", pairs, "--pipeline-model-parallel-size"]
    expected = ranks(1)(train, [*flags, "1"], pair_cache_dir=str(tmp_path / "one"))
    interleaved = ["--num-layers-per-virtual-pipeline-stage", "1"]  # needs packs in groups of two
    found = ranks(4)(train, [*flags, "2", *interleaved], pair_cache_dir=str(tmp_path / "four"))
    assert_same_steps(last_stage(found).steps, last_stage(expected).steps)


def test_safety_labels_swap_and_drop(ranks, tmp_path):
    outcome = last_stage(ranks(1)(train, ["--preference-loss", "safedpo"], pair_cache_dir=str(tmp_path)))
    assert len(outcome.steps) == 3


def test_reference_cache_grows_with_the_pairs_that_are_used(ranks, tmp_path):
    """Pairs left out of one run are scored when another run needs them, and only those."""
    import numpy as np
    from safetensors.numpy import load_file

    def scored_pairs():
        (file,) = tmp_path.glob("reference-*/*.safetensors")
        values = load_file(file)
        return int(np.isfinite(values["conditional"]).all(axis=1).sum()), values["conditional"]

    flags = ["--train-iters", "1", "--long-pairs", "drop", "--seq-length"]
    ranks(1)(train, [*flags, "176"], pair_cache_dir=str(tmp_path))
    some, before = scored_pairs()
    ranks(1)(train, [*flags, "512"], pair_cache_dir=str(tmp_path))
    everything, after = scored_pairs()
    assert 8 < some < everything == 48
    kept = np.isfinite(before)
    assert np.array_equal(before[kept], after[kept])


def test_weighted_sources(ranks, tmp_path):
    """Weight 2 is two visits per pair and epoch, 0.5 is half of the pairs: 2 x 396 + 0.5 x 99 pairs make one epoch."""
    sources = ["--pair-data", "2", str(DATA / "train.jsonl"), "0.5", str(DATA / "heldout.jsonl")]
    flags = [*sources, "--pair-epochs", "0.02"]
    overrides = {"max_pairs": None, "train_iters": None, "pair_cache_dir": str(tmp_path)}
    outcome = last_stage(ranks(1)(train, flags, **overrides))
    expected_steps = round((2 * 396 + 0.5 * 99) * 0.02 / 8)
    assert len(outcome.steps) == expected_steps
