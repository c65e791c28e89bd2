"""All gradients of a step of DPO are transformers' autograd's, by Hugging Face's names: packed pairs, shared prompts.

Logits show what a forward pass computes. A gradient that is summed over the wrong ranks, or not at all, shows here.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_bdpo.data.store import PairStore
from megatron_bdpo.model.hf.config import read_config
from tests.harness.huggingface import renamed, response_log_probs
from tests.harness.jobs import SGD
from tests.harness.recording import merge, train_and_record
from tests.harness.tiny_models import load_model, make_model

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

TP2, SP = ["--tensor-model-parallel-size", "2"], ["--sequence-parallel"]
PP2, CP2 = ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
DENSE = {"TP1": (1, []), "TP2": (2, TP2), "PP2": (2, PP2), "CP2": (2, CP2)}
#: Experts need sequence parallelism with tensor parallelism.
SPARSE = DENSE | {"TP2": (2, [*TP2, *SP]), "EP2": (2, EP2)}
#: Experts with biases are not divided.
WHOLE = SPARSE | {"TP2": (2, [*TP2, *SP, "--expert-tensor-parallel-size", "1"])}

#: One model of each family, with as many of its switches as go together, and its layouts.
MODELS = {
    "llama 3.2": DENSE,
    "mistral": DENSE,
    "qwen2 sliding": DENSE,
    "qwen3": DENSE,
    "gemma": DENSE,
    "gemma2": DENSE,
    "gemma3": DENSE,
    "cohere2": DENSE | {"TP2": (2, [*TP2, *SP])},
    "glm4": DENSE,
    "granite": DENSE,
    "olmo2": DENSE | {"TP2": (2, [*TP2, *SP])},
    "olmo3": DENSE,
    "exaone4": DENSE,
    "mixtral": SPARSE,
    "gpt-oss": WHOLE,
    "llama biased": DENSE,
    "seed oss": DENSE,
    "smollm3": DENSE,
    "ernie 4.5": DENSE,
    "phi3": DENSE,
    "qwen2 moe mixed": SPARSE,
    "glm4 moe": SPARSE,
    "deepseek v3": SPARSE,
    "deepseek v3 moonlight": {"TP2": SPARSE["TP2"]},
    "qwen3 moe unnormed": SPARSE,
}
CASES = {f"{name} {layout}": (name, *case) for name, layouts in MODELS.items() for layout, case in layouts.items()}

# fp32, relative to the largest entry of the tensor: sums over some hundred positions of terms with errors of 1e-7.
GRADIENT = 5e-6
# Tensors this much smaller than the middle one are compared as if they were this large: their terms cancel.
SMALL = 0.05


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Name -> directory of the model, and a function from the pairs to transformers' gradients; each is made once."""
    directory, made = tmp_path_factory.mktemp("models"), {}

    def of(name):
        if name not in made:
            made[name] = make_model(name, directory), {}
        path, gradients = made[name]

        def expected(store):
            if not gradients:
                gradients.update(gradients_in_transformers(path, store, directory))
            return gradients

        return path, expected

    return of


def gradients_in_transformers(model_directory: Path, store: PairStore, scratch: Path) -> dict[str, torch.Tensor]:
    """Of the mean DPO loss of all pairs, at policy == reference.

    transformers itself gives them the names that they have in files: it saves them as a model's weights.
    """
    model = load_model(model_directory)
    for row in range(len(store)):
        pair = store.pair(row)
        chosen, rejected = (response_log_probs(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        margin = chosen.sum() - rejected.sum()
        loss = -torch.nn.functional.logsigmoid(SGD["beta"] * (margin - margin.detach())) / len(store)
        loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    target = scratch / f"{model_directory.name}-gradients"
    model.save_pretrained(target)
    stored = read_config(json.loads((target / "config.json").read_text())).open_weights(target)
    buffers = dict(model.named_buffers())
    return {
        name: stored.rows(name, 0, tensor.shape[0]).clone()
        for name, tensor in stored.tensors.items()
        if name not in buffers
    }


def gradients_here(ranks, model: Path, cache: Path, world_size: int, flags: list[str], mistake=None):
    """The same of a job's step, by the same names; and the pairs of the step."""
    seen = ranks(world_size)(
        train_and_record,
        ["--hf-model", str(model), *flags],
        redraw=False,
        mistake=mistake,
        pair_cache_dir=str(cache),
        **SGD,
    )
    (step,) = merge(seen).steps
    (meta,) = cache.glob("*/meta.json")
    return renamed(step.gradients, json.loads((model / "config.json").read_text())), PairStore.open(meta.parent)


def differences(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor, the largest difference, in units of its largest entry."""
    assert found.keys() == expected.keys()
    typical = float(np.median([float(tensor.abs().max()) for tensor in expected.values()]))
    return {
        name: float((torch.from_numpy(found[name]) - tensor).abs().max())
        / max(float(tensor.abs().max()), SMALL * typical)
        for name, tensor in expected.items()
    }


@pytest.mark.parametrize(("name", "world_size", "flags"), CASES.values(), ids=CASES)
def test_gradients_are_those_of_transformers(ranks, oracle, tmp_path, name, world_size, flags):
    model, expected = oracle(name)
    found, store = gradients_here(ranks, model, tmp_path, world_size, flags)
    worst = differences(found, expected(store))
    assert {name: difference for name, difference in worst.items() if difference > GRADIENT} == {}


def norms_not_marked_for_sequence_parallelism(undo: contextlib.ExitStack) -> None:
    """Each rank keeps the gradient of its own part of the sequence: no logit of the first step is wrong."""
    from megatron_bdpo.model.norm import LocalNorm

    build = LocalNorm.__new__

    def unmarked(cls, *args, **kwargs):
        norm = build(cls, *args, **kwargs)
        norm.weight.sequence_parallel = False
        return norm

    undo.enter_context(mock.patch.object(LocalNorm, "__new__", unmarked))


def shared_keys_not_summed(undo: contextlib.ExitStack) -> None:
    """Local layers as Megatron has them: the rotated part of keys, which all heads share, gets those of one rank."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from megatron_bdpo.model.latent_attention import PairLatentAttention

    original = MLASelfAttention._qkv_down_projection
    undo.enter_context(mock.patch.object(PairLatentAttention, "_qkv_down_projection", original))


def expert_biases_summed_twice(undo: contextlib.ExitStack) -> None:
    """As Megatron marks them."""
    from megatron_bdpo.model import moe, pair_gpt

    def marked(model):
        moe.let_expert_biases_be_added(model)
        for name, parameter in model.named_parameters():
            if name.endswith("linear_fc2.bias"):
                parameter.sequence_parallel = True

    undo.enter_context(mock.patch.object(pair_gpt, "let_expert_biases_be_added", marked))


def places_for_positions(undo: contextlib.ExitStack) -> None:
    """Rotary embeddings of the places in a pack, as Megatron's own layer takes them: answers that share a prompt differ
    in how far they are from it."""
    from megatron_bdpo.model.latent_attention import _AlongPlan

    forward = _AlongPlan.forward

    def by_place(self, length, packed_seq=False):
        whole = self.plan.positions
        with mock.patch.object(self.plan, "positions", torch.arange(len(whole)).clamp(max=length - 1)):
            return forward(self, length)

    undo.enter_context(mock.patch.object(_AlongPlan, "forward", by_place))


def squares_summed_forward_alone(undo: contextlib.ExitStack) -> None:
    """As Megatron's reduction does it, behind which all ranks go on with the same."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    from megatron_bdpo.model.norm import _SumOverRanks

    undo.enter_context(
        mock.patch.object(
            _SumOverRanks, "apply", lambda squares, group: reduce_from_tensor_model_parallel_region(squares)
        )
    )


MISTAKES = {
    "places for positions": (places_for_positions, "deepseek v3", 1, [], ""),
    "expert biases twice": (expert_biases_summed_twice, "gpt-oss", *WHOLE["TP2"], "down_proj.bias"),
    "shared keys of one rank": (shared_keys_not_summed, "deepseek v3", *SPARSE["TP2"], ""),
    "squares summed forward alone": (squares_summed_forward_alone, "olmo2", 2, TP2, ""),
    "norms not marked": (norms_not_marked_for_sequence_parallelism, "qwen3", 2, [*TP2, *SP], "norm.weight"),
}


@pytest.mark.parametrize(("mistake", "name", "world_size", "flags", "where"), MISTAKES.values(), ids=MISTAKES)
def test_a_silent_mistake_shows_in_the_gradients(ranks, oracle, tmp_path, mistake, name, world_size, flags, where):
    model, expected = oracle(name)
    found, store = gradients_here(ranks, model, tmp_path, world_size, flags, mistake)
    worst = differences(found, expected(store))
    wrong = [tensor for tensor, difference in worst.items() if difference > 100 * GRADIENT]
    assert wrong and all(where in tensor for tensor in wrong)
