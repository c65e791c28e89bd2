"""Every layout trains the same: metrics of every step and weights after the last, against one rank."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness.jobs import last_stage, train, whole_weights

LAYOUTS = {
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "TP2 SP": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "PP2 VPP2": (2, ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "DP2": (2, []),
    "DP2 distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "TP2 PP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "TP2 SP PP2": (
        4,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"],
    ),
    "CP2": (2, ["--context-parallel-size", "2"]),
    "TP2 SP CP2": (4, ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "CP2 PP2": (4, ["--context-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "CP4": (4, ["--context-parallel-size", "4"]),
    "TP2 DP2": (4, ["--tensor-model-parallel-size", "2"]),
}

# Log-probs are sums of some hundred fp32 terms of size 5: their rounding is 1e-7 of the sum. Rewards and margins are
# differences of such sums, times beta 0.1, so they are compared on that scale and not on their own.
RELATIVE = 1e-5
LOG_PROB_SCALE = 500.0
BETA = 0.1


@pytest.fixture(scope="module")
def one_rank(ranks, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return cache, ranks(1)(train, [], pair_cache_dir=cache)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_rank(ranks, one_rank, tmp_path, name):
    _, expected = one_rank
    world_size, flags = LAYOUTS[name]
    outcomes = ranks(world_size)(train, flags, pair_cache_dir=str(tmp_path))
    assert_same_steps(last_stage(outcomes).steps, last_stage(expected).steps)
    assert_same_weights(whole_weights(outcomes), whole_weights(expected))


@pytest.mark.parametrize("loss", ["dpo", "simpo", "ipo"])
def test_losses_agree_on_four_ranks(ranks, tmp_path, loss):
    flags = ["--preference-loss", loss]
    expected = ranks(1)(train, flags, pair_cache_dir=str(tmp_path / "one"))
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    outcomes = ranks(4)(train, flags + layout, pair_cache_dir=str(tmp_path / "four"))
    assert_same_steps(last_stage(outcomes).steps, last_stage(expected).steps)


def test_reference_cache_serves_other_layouts(ranks, one_rank):
    """Weights are fingerprinted as wholes: what one rank has scored, four ranks in two stages use."""
    cache, expected = one_rank
    outcomes = ranks(4)(
        train, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"], pair_cache_dir=cache
    )
    assert_same_steps(last_stage(outcomes).steps, last_stage(expected).steps)
    import pathlib

    assert len(list(pathlib.Path(cache).glob("reference-*"))) == 1


def test_first_step_is_ln_2(one_rank):
    first = last_stage(one_rank[1]).steps[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/accuracies"] == 0.5


def assert_same_steps(steps, expected):
    assert [step["iteration"] for step in steps] == [step["iteration"] for step in expected]
    for step, expected_step in zip(steps, expected, strict=True):
        assert step.keys() == expected_step.keys()
        for name, expected_value in expected_step.items():
            if name.startswith("throughput"):
                continue
            scale = BETA * LOG_PROB_SCALE if name.startswith("rewards") else max(1.0, abs(expected_value))
            assert step[name] == pytest.approx(expected_value, abs=RELATIVE * scale), f"{name} at {step['iteration']}"


def assert_same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, expected_value in expected.items():
        # Adam divides by the root of the second moment: where a gradient is near zero its sign is rounding, and the
        # weight moves by up to the learning rate (1e-3) either way. Such elements are few.
        off = np.abs(weights[name] - expected_value) > 1e-5
        assert off.mean() < 1e-3, f"{name}: {off.mean():.2%} of the elements differ"
