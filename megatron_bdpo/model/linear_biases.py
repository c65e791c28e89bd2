"""Biases of some linear layers of a block: Megatron has those of all, or of queries, keys and values alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules

from megatron_bdpo.model.layer_options import LayerOptions


def add_biases(layer: Any, options: LayerOptions) -> None:
    """Have a layer's linear layers built with biases where the options say so.

    Args:
        layer: the spec's ``TransformerLayerSubmodules``, changed in place.
    """
    if options.attention_output_bias:
        attention = layer.self_attention.submodules
        attention.linear_proj = _with_bias(attention.linear_proj)
    if options.mlp_bias:
        mlp = layer.mlp.keywords["submodules"]
        if isinstance(mlp, MLPSubmodules):
            biased = dataclasses.replace(
                mlp, linear_fc1=_with_bias(mlp.linear_fc1), linear_fc2=_with_bias(mlp.linear_fc2)
            )
            layer.mlp = functools.partial(layer.mlp, submodules=biased)


def _with_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": True})

    return build
