"""Hugging Face models in Transformer Engine's layers: every family is filled, computes, and comes back unchanged."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.jobs import flags_of, last_stage, train
from tests.harness.tiny_models import MODELS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]  # fmt: skip


def stored(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_unchanged(ranks, tmp_path, name):
    """After a step at rate 0, which is at the reference too."""
    original, exported = make_model(name, tmp_path), tmp_path / "exported"
    flags = {"hf-model": original, "save-hf": exported, "transformer-impl": "transformer_engine", "train-iters": 1}
    outcomes = ranks(1)(train, flags_of(flags), lr=0.0, min_lr=0.0, weight_decay=0.0)
    assert len(last_stage(outcomes).steps) == 1
    found, expected = stored(exported), stored(original)
    assert found.keys() == expected.keys()
    for weight, expected_value in expected.items():
        assert torch.equal(found[weight], expected_value), weight


def test_layers_add_up_their_gradients_without_apex(ranks):
    """Their own GEMMs add to ``main_grad``, and so does the output layer's kernel: the steps are those of autograd."""
    flags = ["--transformer-impl", "transformer_engine", "--no-pack-pairs", "--max-pairs", "24"]
    added = last_stage(ranks(1)(train, flags)).steps
    by_autograd = last_stage(ranks(1)(train, [*flags, "--no-gradient-accumulation-fusion"])).steps
    assert len(added) == 3 and added[0]["grad_norm"] > 0
    for one, other in zip(added, by_autograd, strict=True):
        # fp32, but in tensor cores' TF32 where Transformer Engine lets them: sums in another order.
        for name in ("loss", "grad_norm", "rewards/margins"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("experts", ["", "--num-experts 4 --moe-token-dispatcher-type alltoall"])
def test_adapters_take_the_steps_of_those_beside_local_layers(ranks, kind, experts):
    """With the norms apart from the linear layers, and an adapter for each of grouped experts."""
    flags = [*f"--lora-rank 4 --lora-alpha 32 --lora-type {kind} --no-pack-pairs --max-pairs 24 {experts}".split()]
    grouped = ["--moe-grouped-gemm"] if experts else []
    te = last_stage(ranks(1)(train, [*flags, *grouped, "--transformer-impl", "transformer_engine"])).steps
    local = last_stage(ranks(1)(train, [*flags, "--transformer-impl", "local"])).steps
    assert te[-1]["rewards/margins"] != 0
    for one, other in zip(te, local, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins"):  # TF32, see above
            assert one[name] == pytest.approx(other[name], rel=1e-2, abs=1e-3), name
