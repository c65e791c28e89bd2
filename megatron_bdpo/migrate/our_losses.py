"""The losses that other trainers have too, with their options. What else there is, the registry knows, with torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

_USUAL = frozenset({"beta", "nll_weight"})

#: Held to the registry by a test. That is not asked for these: it takes seconds to import.
OPTIONS: Mapping[str, frozenset[str]] = {
    "dpo": _USUAL | {"label_smoothing"},
    "robust": _USUAL | {"label_smoothing"},
    "ipo": _USUAL | {"ipo_length_normalized"},
    "hinge": _USUAL,
    "cpo": _USUAL,
    "simpo": _USUAL | {"simpo_gamma"},
    "orpo": frozenset({"orpo_weight"}),
}


def options_of(name: str) -> frozenset[str] | None:
    """The options of a loss by name; None where there is no such loss."""
    if name in OPTIONS:
        return OPTIONS[name]
    from megatron_bdpo.losses import registry  # imports torch

    specs = {spec.name: spec for spec in registry.all_specs()}
    return frozenset(each.name for each in fields(specs[name].options)) if name in specs else None
