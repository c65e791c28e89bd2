"""Weights as wholes: their fingerprint, what names a reference, and their random start depend on no layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.jobs import TINY_JOB, TINY_MODEL, Outcome, copy_shards, whole_weights

VOCABULARY = 1024  # of the example tokenizer
# Padded to 1100 rows on one rank, to 1200 with two tensor-parallel ranks.
ODD_VOCABULARY = ["--make-vocab-size-divisible-by", "100"]

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "TP2": (2, TP2),
    "TP2 SP": (2, [*TP2, "--sequence-parallel"]),
    "PP2": (2, PP2),
    "PP2 with virtual stages": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "DP2": (2, []),
    "CP2": (2, ["--context-parallel-size", "2", "--reference", "resident"]),
    "TP2 PP2": (4, TP2 + PP2),
}


@dataclass
class Seen:
    """What one rank saw of the model at its start."""

    digest: str
    shards: list[Any]
    digest_after_padding_changed: str
    digests_after_a_bit_flipped: dict[str, str]  # by shard; one element of each is changed and put back
    digest_after_two_elements_swapped: str
    digest_after_two_layers_swapped: str
    digest_at_the_end: str
    identities: list[dict[str, Any]]  # of the reference, before and after Megatron has set up its trainer


class _Enough(Exception):
    """Ends a run once its model has been looked at."""


def look(flags: list[str], edit: bool = False) -> Seen:
    """Build the tiny model by the real job and fingerprint it; with ``edit`` (on one rank only), edits of it, too."""
    from megatron.core.utils import unwrap_model

    from megatron_bdpo.model.digest import weights_digest
    from megatron_bdpo.model.shards import weight_shards
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.reference.fingerprint import reference_identity
    from megatron_bdpo.training.run import PreferenceRun

    seen: list[Seen] = []
    identities: list[dict[str, Any]] = []

    class LookingRun(PreferenceRun):
        def identify(self, weights: str) -> None:
            identities.append(reference_identity(self.config, weights, self.scoring))

        def after_load(self, model: list[Any]) -> None:
            chunks = unwrap_model(model)

            def digest() -> str:
                return weights_digest(chunks, self.scoring.vocab_size)

            first, shards = digest(), copy_shards(model)
            self.identify(first)
            with torch.no_grad():
                for shard in weight_shards(chunks):
                    if shard.allow_shape_mismatch:
                        shard.data[max(0, VOCABULARY - shard.global_offset[0]) :] += 1
                padding = digest()
                flipped, elements, layers = edits(list(weight_shards(chunks)), digest) if edit else ({}, "", "")
            seen.append(Seen(first, shards, padding, flipped, elements, layers, digest(), identities))
            raise _Enough

    arguments = Arguments.parse([*ODD_VOCABULARY, *flags], TINY_MODEL | TINY_JOB | {"max_pairs": 8, "train_iters": 1})
    with distributed.process_groups(arguments.settings.process):
        try:
            run = LookingRun(arguments)
            run.identify("not known yet")
            run.pretrain()
        except _Enough:
            return seen[0]
    raise AssertionError("the run ended before its model was built")


def edits(shards: list[Any], digest: Any) -> tuple[dict[str, str], str, str]:
    """Change, fingerprint, put back: see :class:`Seen`."""
    flipped = {}
    for number, shard in enumerate(shards):
        bits = shard.data.view(torch.int32 if shard.data.element_size() == 4 else torch.int16).view(-1)
        bits[number % bits.numel()] ^= 1
        flipped[f"{number} {shard.key} {shard.global_offset}"] = digest()
        bits[number % bits.numel()] ^= 1
    matrix = next(shard.data for shard in shards if shard.key.endswith("linear_proj.weight"))
    matrix[0, [0, 1]] = matrix[0, [1, 0]]
    elements = digest()
    matrix[0, [0, 1]] = matrix[0, [1, 0]]
    one, other = [shard.data for shard in shards if shard.key.endswith("linear_fc2.weight")][:2]
    kept = one.clone()
    one.copy_(other), other.copy_(kept)
    layers = digest()
    other.copy_(one), one.copy_(kept)
    return flipped, elements, layers


@pytest.fixture(scope="module")
def one_rank(ranks) -> Seen:
    return ranks(1)(look, [], edit=True)[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, ranks) -> list[Seen]:
    world_size, flags = LAYOUTS[request.param]
    return ranks(world_size)(look, flags)


def without_padding(seen: list[Seen]) -> dict[str, np.ndarray]:
    whole = whole_weights([Outcome([], [], each.shards) for each in seen])
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    return {name: value[:VOCABULARY] if name in vocabulary else value for name, value in whole.items()}


def test_random_weights_are_the_same_in_every_layout(layout, one_rank):
    weights, expected = without_padding(layout), without_padding([one_rank])
    assert weights.keys() == expected.keys()
    for name, expected_value in expected.items():
        assert np.array_equal(weights[name], expected_value), name


def test_digest_is_the_same_in_every_layout(layout, one_rank):
    assert {seen.digest for seen in layout} == {one_rank.digest}


def test_a_reference_has_one_identity_in_every_layout(layout, one_rank):
    (before, after), *others = one_rank.identities, *(seen.identities for seen in layout)
    assert others == [[before, after]] * len(layout)
    assert before == after | {"weights": "not known yet"}


def test_digest_leaves_out_rows_that_pad_the_vocabulary(layout, one_rank):
    assert {seen.digest_after_padding_changed for seen in [*layout, one_rank]} == {one_rank.digest}


def test_digest_changes_with_one_bit_of_any_tensor(one_rank):
    digests = one_rank.digests_after_a_bit_flipped
    # Per layer: qkv, proj, gate, up, fc2 and two norms; embedding, last norm, output.
    assert len(digests) == TINY_MODEL["num_layers"] * 7 + 3
    assert [name for name, digest in digests.items() if digest == one_rank.digest] == []
    assert len(set(digests.values())) == len(digests)


def test_digest_changes_when_elements_or_layers_change_places(one_rank):
    assert one_rank.digest_after_two_elements_swapped != one_rank.digest
    assert one_rank.digest_after_two_layers_swapped != one_rank.digest
    assert one_rank.digest_at_the_end == one_rank.digest  # all edits were undone


def test_digest_of_half_precision_weights_is_the_same_in_every_layout(ranks, one_rank):
    expected = ranks(1)(look, ["--bf16"])[0].digest
    assert expected != one_rank.digest
    assert {seen.digest for seen in ranks(2)(look, ["--bf16", *TP2])} == {expected}


def test_digest_of_experts_is_the_same_in_every_layout(ranks):
    experts = ["--num-experts", "4", "--moe-ffn-hidden-size", "48"]
    (expected,) = ranks(1)(look, experts)
    split = ["--expert-model-parallel-size", "2"]
    seen = [*ranks(2)(look, [*experts, *split]), *ranks(4)(look, [*experts, *split, *TP2, "--sequence-parallel"])]
    assert {each.digest for each in seen} == {expected.digest}
    assert all(each.identities == expected.identities for each in seen)


def test_seed_decides_the_random_weights(ranks, one_rank):
    other = without_padding(ranks(1)(look, ["--seed", "7"]))
    for name, value in without_padding([one_rank]).items():
        is_vector = value.ndim == 1 or name.endswith("layer_norm_weight")
        assert np.array_equal(other[name], value) == is_vector, name


def test_random_weights_have_the_configured_spread(one_rank):
    """Megatron's defaults: 0.02, divided by sqrt(2 x layers) where a layer writes to the residual stream."""
    for name, value in without_padding([one_rank]).items():
        if name.endswith(("norm_weight", "layernorm.weight")):
            assert (value == 1).all(), name
            continue
        writes = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / np.sqrt(2 * TINY_MODEL["num_layers"]) if writes else 0.02
        assert value.std() == pytest.approx(expected, rel=0.05), name  # 4096 draws and more: 1% is one sigma
        layers = value.reshape(TINY_MODEL["num_layers"], -1) if name.startswith("decoder.layers.") else value
        assert len(np.unique(layers[:, 0])) == len(layers), f"{name}: layers or rows repeat"
