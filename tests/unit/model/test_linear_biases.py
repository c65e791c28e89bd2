"""Biases of some layers: which linear layers of Megatron's own specs are built with them, of either implementation."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from megatron_bdpo.model.layer_options import LayerOptions


def built(options: dict[str, bool], use_te: bool) -> list[bool]:
    """On a rank: what a layer's linear layers are told of biases where Megatron says there are none."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from megatron_bdpo.model.linear_biases import add_biases

    def linear(*sizes: int, bias: bool, **others: Any) -> bool:
        return bias

    if use_te:  # whose classes cannot be imported here: its spec has one for each of these places
        submodules = TransformerLayerSubmodules(
            self_attention=ModuleSpec(object, submodules=SelfAttentionSubmodules(linear, object, linear)),
            mlp=functools.partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=linear, linear_fc2=linear)),
        )
    else:
        submodules = gpt_layer_specs.get_gpt_layer_local_submodules()
        submodules.self_attention.submodules.linear_qkv = submodules.self_attention.submodules.linear_proj = linear
        for name in ("linear_fc1", "linear_fc2"):
            setattr(submodules.mlp.keywords["submodules"], name, linear)
    add_biases(submodules, LayerOptions(**options))
    attention, mlp = submodules.self_attention.submodules, submodules.mlp.keywords["submodules"]
    places = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    return [place(4, 4, bias=False, skip_bias_add=True) for place in places]


@pytest.mark.parametrize("use_te", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [False, False, False, False]),
        ({"attention_output_bias": True}, [False, True, False, False]),
        ({"mlp_bias": True}, [False, False, True, True]),
    ],
)
def test_biases_are_where_the_options_say(ranks, options, expected, use_te):
    (found,) = ranks(1)(built, options, use_te)
    assert found == expected
