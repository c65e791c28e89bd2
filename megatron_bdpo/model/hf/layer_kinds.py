"""Families whose layers are of two kinds: with a window, or attending to all; each with rotary positions of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import Config
from megatron_bdpo.model.hf.kinds import pop_number, shown

LOCAL, GLOBAL = "sliding_attention", "full_attention"

#: The rotary base of layers with a window, by the name that Gemma 3 has for it.
LOCAL_BASE = "rope_local_base_freq"


def with_layer_types(values: Config, period: int) -> Config:
    """Where a file does not say so itself, every ``period``-th layer attends to all, and the others have a window."""
    if values.get("layer_types") is not None:
        return values
    kinds = [LOCAL if (layer + 1) % period else GLOBAL for layer in range(values["num_hidden_layers"])]
    return {**values, "layer_types": kinds}


def with_rope_of_kinds(values: Config) -> Config:
    """Rotary settings of layers that attend to all where other families have those of all layers, and the base of those
    with a window as ``LOCAL_BASE``.

    Args:
        values: with ``rope_theta`` and ``LOCAL_BASE`` as they are where a kind's settings leave the base out.

    Raises:
        UserError: settings that are not by kind, or scaled positions of layers with a window.
    """
    rope = values.get("rope_parameters")
    if rope is None:
        return values
    if not rope.keys() <= {LOCAL, GLOBAL} or not all(isinstance(each or {}, Mapping) for each in rope.values()):
        raise UserError(
            f"config.json: rope_parameters {shown(rope)}: settings of {LOCAL} and of {GLOBAL} are expected."
        )
    local = {"rope_theta": values[LOCAL_BASE], **(rope.get(LOCAL) or {})}
    base, kind = pop_number(local, "rope_theta"), local.pop("rope_type", None)
    if local or kind not in (None, "default"):
        raise UserError(
            f"config.json: rope_parameters {shown(rope)}: positions of layers with a window are not scaled here."
        )
    return {**values, "rope_parameters": dict(rope.get(GLOBAL) or {}), LOCAL_BASE: base}


def layer_types(arguments: Mapping[str, Any]) -> list[str]:
    """The way back, from Megatron's arguments."""
    slides = arguments.get("window_attn_skip_freq")
    if not isinstance(slides, list):
        slides = [arguments.get("window_size") is not None] * arguments["num_layers"]
    return [LOCAL if each else GLOBAL for each in slides]
