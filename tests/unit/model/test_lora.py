"""Adapters on one rank: grouped experts against single ones, what is merged, and what checkpoints call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.lora.lora_config import GROUPS, PROJECTIONS, LoraConfig, parse_targets


def grouped_against_single(kind: str) -> dict[str, Any]:
    """On a rank: three experts' layer in one, as Transformer Engine has it, beside three single ones."""
    from megatron.core import parallel_state

    from megatron_bdpo.model.lora.adapter import LoraAdapter, Outputs
    from megatron_bdpo.model.lora.attach import _add_to, adapters_off, merge
    from megatron_bdpo.model.lora.split import COLUMN, Split
    from megatron_bdpo.training.distributed import process_groups
    from tests.harness.jobs import own_process

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(3):
                self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(8, 6), requires_grad=False))

        def forward(self, hidden: torch.Tensor, splits: list[int]) -> tuple[torch.Tensor, None]:
            parts = zip(hidden.split(splits), (self.weight0, self.weight1, self.weight2), strict=True)
            return torch.cat([part @ weight.t() for part, weight in parts]), None

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_fc1 = Grouped()

    class Model:
        gated_linear_unit, expert_model_parallel_size, sequence_parallel = True, 1, False

    with process_groups(own_process()):
        parallel_state.initialize_model_parallel()
        torch.manual_seed(5)
        experts, config = Experts(), LoraConfig(2, 3.0, kind=kind)  # type: ignore[arg-type]
        _add_to(experts, "linear_fc1", config, Model(), is_expert=True)
        adapters = experts.linear_fc1_adapter
        for parameter in adapters.parameters():
            parameter.data.normal_()
        hidden, splits = torch.randn(7, 6, requires_grad=True), [3, 0, 4]
        output, _ = experts.linear_fc1(hidden, splits)
        output.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in adapters.parameters()]
        inputs = hidden.grad.clone()
        expected, hidden.grad = [], None
        group = parallel_state.get_expert_tensor_parallel_group()
        outputs = Outputs({"gate_proj": 4, "up_proj": 4})
        for i, part in enumerate(hidden.split(splits)):
            weight = getattr(experts.linear_fc1, f"weight{i}")
            single = LoraAdapter(config, weight, outputs, Split(COLUMN, group, is_expert=True))
            single.load_state_dict(adapters[i].state_dict())
            expected.append((single(part, part @ weight.t(), weight, None), single))
        whole = torch.cat([each for each, _ in expected])
        whole.square().sum().backward()
        singles = [parameter.grad for _, single in expected for parameter in single.parameters()]
        state = adapters.sharded_state_dict(
            "linear_fc1_adapter.", (), {"dp_cp_group": parallel_state.get_data_parallel_group()}
        )
        with adapters_off([experts]):
            without, _ = experts.linear_fc1(hidden, splits)
        base, _ = Grouped.forward(experts.linear_fc1, hidden, splits), None
        merge([experts])
        merged, _ = experts.linear_fc1(hidden, splits)
        parallel_state.destroy_model_parallel()
        return {
            "outputs": float((output - whole).abs().max()),
            "gradients": max(float((a - b).abs().max()) for a, b in zip(gradients, singles, strict=True)),
            "inputs": float((inputs - hidden.grad).abs().max()),
            "without": float((without - base[0]).abs().max()),
            "merged": float((merged - output).abs().max()),
            "moved": float((output - without).abs().max()),
            "places": {
                name: (shard.key, shard.global_shape, shard.global_offset) for name, shard in sorted(state.items())
            },
        }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_grouped_experts(ranks, kind):
    """Transformer Engine's layer needs a GPU; its interface stands in: ``weight0``, ..., tokens by expert."""
    (found,) = ranks(1)(grouped_against_single, kind)
    for name in ("outputs", "gradients", "inputs", "without"):
        assert found[name] == 0, name
    assert found["merged"] < 1e-4 < 0.1 < found["moved"]
    places = found["places"]
    assert len(places) == 3 * (6 if kind == "dora" else 4)
    assert places["linear_fc1_adapter.2.up_proj_B"] == ("linear_fc1_adapter.up_proj_B", (3, 4, 2), (2, 0, 0))


def grouped_places() -> list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """On a rank of two that share four experts: where checkpoints have its adapters."""
    from megatron.core import parallel_state

    from megatron_bdpo.model.lora.adapter import LoraAdapter, Outputs
    from megatron_bdpo.model.lora.grouped import GroupedAdapters
    from megatron_bdpo.model.lora.split import ROW, Split
    from megatron_bdpo.training.distributed import process_groups
    from tests.harness.jobs import own_process

    with process_groups(own_process()):
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
        split = Split(ROW, parallel_state.get_expert_tensor_parallel_group(), is_expert=True)
        own = [LoraAdapter(LoraConfig(2, 3.0), torch.zeros(6, 4), Outputs({"down_proj": 6}), split) for _ in range(2)]
        state = GroupedAdapters(own).sharded_state_dict(
            "fc2.", (), {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        )
        parallel_state.destroy_model_parallel()
    return [(each.key, each.global_shape, each.global_offset, each.replica_id) for each in state.values()]


def test_experts_of_two_ranks_are_four_in_a_checkpoint(ranks):
    found = [place for own in ranks(2)(grouped_places) for place in own]
    assert {(shape, offset) for key, shape, offset, _ in found if key == "fc2.down_proj_B"} == {
        ((4, 6, 2), (expert, 0, 0)) for expert in range(4)
    }
    assert all(not any(replica) for *_, replica in found), "each is the main copy of its expert"


def in_training_and_not() -> dict[str, float]:
    """On a rank: how far an adapter with dropout is from one without."""
    from megatron.core import parallel_state

    from megatron_bdpo.model.lora.adapter import LoraAdapter, Outputs
    from megatron_bdpo.model.lora.split import COLUMN, Split
    from megatron_bdpo.training.distributed import process_groups
    from tests.harness.jobs import own_process

    with process_groups(own_process()):
        parallel_state.initialize_model_parallel()
        split = Split(COLUMN, parallel_state.get_tensor_model_parallel_group())
        torch.manual_seed(3)
        weight, hidden = torch.randn(6, 4), torch.randn(9, 1, 4)
        with_dropout, without = (
            LoraAdapter(LoraConfig(2, 3.0, dropout=dropout), weight, Outputs({"o_proj": 6}), split)
            for dropout in (0.5, 0.0)
        )
        for parameter in with_dropout.parameters():
            parameter.data.normal_()
        without.load_state_dict(with_dropout.state_dict())
        outputs = [
            each.train(mode)(hidden, hidden @ weight.t(), weight, None)
            for each, mode in ((with_dropout, True), (with_dropout, False), (without, True))
        ]
        parallel_state.destroy_model_parallel()
    return {
        "training": float((outputs[0] - outputs[2]).abs().max()),
        "evaluating": float((outputs[1] - outputs[2]).abs().max()),
    }


def test_dropout_is_for_training(ranks):
    (found,) = ranks(1)(in_training_and_not)
    assert found["training"] > 0.1 and found["evaluating"] == 0


def merged_in_half_precision() -> tuple[float, float]:
    """On a rank: errors of a merge in bf16, against the sum in fp32 and against that rounded once."""
    from megatron_bdpo.model.lora.merging import merged

    torch.manual_seed(4)
    weight = torch.randn(64, 48).bfloat16()
    low, up = torch.randn(8, 48).bfloat16(), 0.01 * torch.randn(64, 8).bfloat16()
    tensors = {f"base_model.model.x.lora_{name}.weight": value for name, value in (("A", low), ("B", up))}
    found = merged("x.weight", weight, tensors, LoraConfig(8, 16.0))
    expected = weight.double() + 2 * (up.double() @ low.double())
    return float((found.double() - expected).abs().max()), float((found - expected.bfloat16()).abs().max())


def test_a_merge_rounds_once(ranks):
    ((off, off_rounded),) = ranks(1)(merged_in_half_precision)
    assert off_rounded == 0 < off


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", PROJECTIONS),
        ("attention", GROUPS["attention"]),
        ("mlp, q_proj", ("q_proj", "gate_proj", "up_proj", "down_proj")),
        ("w2,w1", ("gate_proj", "down_proj")),
    ],
)
def test_targets(text, expected):
    assert parse_targets(text, gated=True) == expected


def test_targets_without_a_gate():
    assert "gate_proj" not in parse_targets("all-linear", gated=False)
    with pytest.raises(UserError, match="gate_proj: the model has no such projection"):
        parse_targets("gate_proj", gated=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "--lora-rank 0"),
        ({"alpha": 0.0}, "--lora-alpha 0"),
        ({"dropout": 1.0}, "--lora-dropout 1"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**{"rank": 4, "alpha": 8.0, **settings})


def te_layer_apart() -> dict[str, Any]:
    """On a rank: what becomes of Transformer Engine's spec of a layer, with stand-ins for its classes alone."""
    import functools
    from types import SimpleNamespace
    from unittest import mock

    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from megatron_bdpo.model.norm import separate_norms

    fused, plain, norm = object(), object(), object()
    backend = SimpleNamespace(
        column_parallel_layer_norm_linear=lambda: fused, column_parallel_linear=lambda: plain, layer_norm=lambda: norm
    )
    mlp = functools.partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=fused, linear_fc2=plain))
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(object, submodules=SelfAttentionSubmodules(fused, object, plain)),
        mlp=mlp,
        sharded_state_dict_keys_map={"mlp.0.weight": "mlp.linear_fc1.layer_norm_weight"},
    )
    with mock.patch.object(provider, "TESpecProvider", lambda: backend):
        separate_norms(layer)
    return {
        "qkv": layer.self_attention.submodules.linear_qkv is plain,
        "fc1": layer.mlp.keywords["submodules"].linear_fc1 is plain,
        "fc2": layer.mlp.keywords["submodules"].linear_fc2 is plain,
        "norms": layer.input_layernorm is norm and layer.pre_mlp_layernorm is norm,
        "others": mlp.keywords["submodules"].linear_fc1 is fused,
        "names": layer.sharded_state_dict_keys_map,
    }


def test_norms_stand_apart_from_fused_layers(ranks):
    """Checkpoints name them as Megatron's local layers have them."""
    (found,) = ranks(1)(te_layer_apart)
    names = found.pop("names")
    assert all(found.values()), found
    (local,) = ranks(1)(names_of_local_layers)
    assert local.items() <= names.items() and "mlp.0.weight" in names


def names_of_local_layers() -> dict[str, str]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules

    return dict(get_gpt_layer_local_submodules().sharded_state_dict_keys_map)
