"""Many steps in a row: no stage waits for another's data."""

from __future__ import annotations

from tests.harness.jobs import DATA, TINY_MODEL, last_stage, train

STEPS = 200


def test_four_stages_take_two_hundred_steps(ranks, tmp_path):
    """Packs differ in pairs, runs and scored positions; what travels between stages does not (Megatron-LM #5100)."""
    job = {"max_pairs": 96, "pairs_per_step": 6, "train_iters": STEPS, "log_interval": 1, "lr": 1e-3}
    flags = ["--pipeline-model-parallel-size", "4", "--preference-loss", "simpo"]
    data = {"pair_data": [str(DATA / "train.jsonl")], "pair_cache_dir": str(tmp_path)}
    outcomes = ranks(4)(train, flags, **(TINY_MODEL | job | data))
    losses = [step["loss"] for step in last_stage(outcomes).steps]
    assert len(losses) == STEPS
    assert losses[-1] < 0.5 * losses[0]
