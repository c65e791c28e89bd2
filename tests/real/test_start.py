"""A real checkpoint is read without a remark, in every layout it can have, and its logits are transformers'."""

from __future__ import annotations

import json

import pytest

from megatron_bdpo.model.hf.config import read_config
from tests.distributed.test_bad_input import refusal
from tests.harness.jobs import last_stage
from tests.harness.tiny_models import largest_difference, logits

TP3 = "--tensor-model-parallel-size 3"
PP2 = "--pipeline-model-parallel-size 2"

#: Nine heads in three groups, 30 layers: what divides them.
LAYOUTS = {
    "TP1": (1, ""),
    "TP3 SP": (3, f"{TP3} --sequence-parallel"),
    "PP2": (2, PP2),
    "CP2": (2, "--context-parallel-size 2"),
    "TP3 PP2": (6, f"{TP3} {PP2}"),
}

# fp32: logits are up to 30, where one unit in the last place is 2e-6; each is a sum of 576 products, after 30 layers.
# Seen: 7e-5.
LOGIT = 3e-4


def test_config_is_read_without_a_remark(smollm2):
    """What transformers writes into it is known: nothing is left out, and nothing is said to be without effect."""
    architecture = read_config(json.loads((smollm2 / "config.json").read_text()))
    assert architecture.remark == ""
    arguments = architecture.arguments
    assert (arguments["num_attention_heads"], arguments["num_query_groups"], arguments["kv_channels"]) == (9, 3, 64)
    assert arguments["rotary_base"] == 100_000 and arguments["untie_embeddings_and_output_weights"] is False


@pytest.mark.parametrize(("world_size", "flags"), LAYOUTS.values(), ids=LAYOUTS)
def test_logits_are_those_of_transformers(ranks, tmp_path, job, model, world_size, flags):
    one_pair = {"max_pairs": 1, "pairs_per_step": 1, "train_iters": 1, "preference_loss": "dpo"}
    cache = {"pair_cache_dir": str(tmp_path)}  # of its own: what is scored already has no logits
    found = last_stage(ranks(world_size)(logits, flags.split(), **job | one_pair | cache))
    if world_size == 6:
        ranks(6).close()  # nothing else uses as many
    assert len(found) == 2
    assert largest_difference(found, model) <= LOGIT


def test_two_tensor_parallel_ranks_are_refused(ranks, job):
    """At the start, before weights are read, on every rank; with the size that does it."""
    for message in ranks(2)(refusal, ["--tensor-model-parallel-size", "2"], **job):
        assert "9 attention heads cannot be split over 2 tensor-parallel ranks" in message
        assert "--tensor-model-parallel-size of this model: 1 or 3." in message
