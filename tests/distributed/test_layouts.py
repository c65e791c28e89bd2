"""What a run reports does not depend on its layout; that its training does not is proved in tests/parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.harness.jobs import last_stage, train
from tests.harness.parity import assert_same_steps

TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]


@pytest.fixture(scope="module")
def one_rank(ranks, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return cache, ranks(1)(train, [], pair_cache_dir=cache)


@pytest.mark.parametrize("flags", [TP2_PP2, [*TP2_PP2, "--sequence-parallel"], CP2], ids=" ".join)
def test_all_metrics_are_those_of_one_rank(ranks, one_rank, tmp_path, flags):
    outcomes = ranks(4)(train, flags, pair_cache_dir=str(tmp_path))
    assert_same_steps(last_stage(outcomes).steps, last_stage(one_rank[1]).steps)


def test_ipo_on_four_ranks(ranks, tmp_path):
    """A loss that reads the numbers of tokens."""
    flags = ["--preference-loss", "ipo"]
    expected = ranks(1)(train, flags, pair_cache_dir=str(tmp_path / "one"))
    outcomes = ranks(4)(train, flags + TP2_PP2, pair_cache_dir=str(tmp_path / "four"))
    assert_same_steps(last_stage(outcomes).steps, last_stage(expected).steps)


@pytest.mark.parametrize("flags", [TP2_PP2, CP2], ids=" ".join)
def test_reference_cache_serves_other_layouts(ranks, one_rank, flags):
    """Weights are fingerprinted as wholes: what one rank has scored, four ranks use."""
    cache, expected = one_rank
    outcomes = ranks(4)(train, flags, pair_cache_dir=cache)
    assert_same_steps(last_stage(outcomes).steps, last_stage(expected).steps)
    assert len(list(Path(cache).glob("reference-*"))) == 1


def test_first_step_is_ln_2(one_rank):
    first = last_stage(one_rank[1]).steps[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("flags", [[*TP2_PP2, "--sequence-parallel"], CP2], ids=" ".join)
def test_learned_sinks(ranks, tmp_path, flags):
    """Divided by head; each head's counts once in the gradient's norm."""
    learned = ["--softmax-type", "learnable"]
    expected = ranks(1)(train, learned, pair_cache_dir=str(tmp_path / "one"))
    outcomes = ranks(4)(train, [*learned, *flags], pair_cache_dir=str(tmp_path / "four"))
    assert_same_steps(last_stage(outcomes).steps, last_stage(expected).steps)
