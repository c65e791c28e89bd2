"""What options make of Transformer Engine's spec of a layer, with stand-ins for its classes alone."""

from __future__ import annotations

from typing import Any

import pytest


def changed(options: dict[str, Any]) -> dict[str, str]:
    """On a rank, which has Megatron: the names of what stands where."""
    import functools
    from types import SimpleNamespace
    from unittest import mock

    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megatron_bdpo.model.layer import PairLayer, with_options
    from megatron_bdpo.model.layer_options import LayerOptions
    from megatron_bdpo.model.norm import LayerNormWithoutBias

    fused, plain, norm = object(), object(), object()
    names = {fused: "fused", plain: "plain", norm: "norm", IdentityOp: "nothing", LayerNormWithoutBias: "no bias"}
    backend = SimpleNamespace(
        column_parallel_layer_norm_linear=lambda: fused, column_parallel_linear=lambda: plain, layer_norm=lambda: norm
    )
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(object, submodules=SelfAttentionSubmodules(fused, object, plain)),
        mlp=functools.partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=fused, linear_fc2=plain)),
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    with mock.patch.object(provider, "TESpecProvider", lambda: backend):
        with_options(spec, LayerOptions(**options), use_te=True)
    return {
        "before attention": names[layer.input_layernorm],
        "qkv": names[layer.self_attention.submodules.linear_qkv],
        "before MLP": names[layer.pre_mlp_layernorm],
        "fc1": names[layer.mlp.keywords["submodules"].linear_fc1],
        "behind": names[spec.params["norm"]] if spec.module is PairLayer else "",
    }


FUSED = {"before attention": "nothing", "qkv": "fused", "before MLP": "nothing", "fc1": "fused"}
PLAIN = {"before attention": "nothing", "qkv": "plain", "before MLP": "nothing", "fc1": "plain"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {**FUSED, "behind": ""}),
        ({"layer_norms": "around"}, {**FUSED, "behind": "norm"}),
        ({"layer_norms": "after"}, {**PLAIN, "behind": "norm"}),
        ({"residual_multiplier": 0.2}, {**FUSED, "behind": "norm"}),
        ({"parallel_layers": True}, {**PLAIN, "before attention": "norm", "behind": "norm"}),
        (
            {"parallel_layers": True, "norms_without_bias": True},
            {**PLAIN, "before attention": "no bias", "behind": "norm"},
        ),
    ],
    ids=str,
)
def test_norms_are_where_the_options_say(ranks, options, expected):
    assert ranks(1)(changed, options) == [expected]
