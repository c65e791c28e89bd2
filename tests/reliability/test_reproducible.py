"""The same seed and layout give the same bits; another layout the same within rounding; and what it takes is on record.

tests/parity compares every layout; here is one of each.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.harness.jobs import last_stage, train, whole_weights
from tests.parity.conftest import TELLING, WELL_CONDITIONED

ROOT = Path(__file__).parents[2]
JOB = ["--train-iters", "4", "--eval-share", "0.1", "--eval-interval", "2", "--num-layers", "2"]


def run(ranks, world_size, flags, directory, **overrides):
    """With tokens and scores of its own: nothing is taken over from another run."""
    return ranks(world_size)(train, [*JOB, *flags], pair_cache_dir=str(directory), **overrides)


def without_times(records):
    return [{k: v for k, v in record.items() if not k.startswith("throughput")} for record in records]


@pytest.mark.parametrize(
    "flags",
    ["--tensor-model-parallel-size 2 --sequence-parallel", "--use-distributed-optimizer", "--reference resident"],
)
def test_the_same_run_again_is_the_same_to_the_bit(ranks, tmp_path, flags):
    expected, found = (run(ranks, 2, flags.split(), tmp_path / name) for name in ("first", "second"))
    assert without_times(last_stage(found).steps) == without_times(last_stage(expected).steps)
    assert without_times(last_stage(found).evaluations) == without_times(last_stage(expected).evaluations)
    weights, expected_weights = whole_weights(found), whole_weights(expected)
    assert weights.keys() == expected_weights.keys()
    assert all(np.array_equal(weights[name], value) for name, value in expected_weights.items())


def test_another_seed_is_another_run(ranks, tmp_path):
    """Or the test above would compare nothing."""
    first, second = (run(ranks, 2, ["--seed", seed], tmp_path / seed) for seed in ("5", "6"))
    assert last_stage(first).steps[0]["logps/chosen"] != last_stage(second).steps[0]["logps/chosen"]


def test_another_layout_is_the_same_run_within_rounding(ranks, tmp_path):
    """As far as the parity matrix allows: sums are added in another order."""
    overrides = TELLING | WELL_CONDITIONED
    expected = run(ranks, 1, [], tmp_path / "one", **overrides)
    found = run(ranks, 2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"], tmp_path / "two", **overrides)
    for step, expected_step in zip(last_stage(found).steps, last_stage(expected).steps, strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-5)
        assert step["logps/chosen"] == pytest.approx(expected_step["logps/chosen"], rel=1e-5)


def test_what_a_run_depends_on_is_on_record(ranks, tmp_path):
    save = tmp_path / "run"
    flags = ["--tensor-model-parallel-size", "2", "--seed", "7", "--save", str(save), "--save-interval", "4"]
    run(ranks, 2, flags, tmp_path / "cache")
    record = json.loads((save / "run.json").read_text())
    assert record["seed"] == 7
    (store,) = (tmp_path / "cache").glob("*/meta.json")
    assert record["data"] == {"train": json.loads(store.read_text())["fingerprint"]}
    assert len(record["reference"]["weights"]) == 16
    assert record["layout"]["ranks"] == 2 and record["layout"]["tensor_model_parallel_size"] == 2
    assert record["layout"]["data_parallel_size"] == 1
    assert record["precision"]["parameters"] == "torch.float32"
    assert record["determinism"]["deterministic_mode"] is False
    assert record["determinism"]["environment"]["OMP_NUM_THREADS"] == "1"
    versions = record["versions"]
    assert versions["python"] == platform.python_version()
    for name in ("megatron-core", "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors"):
        assert versions[name] == importlib.metadata.version(name)
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert versions["megatron_bdpo commit"].startswith(head.stdout.strip())
    assert f"# torch: {versions['torch']}\n" in (save / "recipe.yaml").read_text()
