"""Preference losses: pure functions of per-pair log-probs, and the registry that names them.

    options = build_options("bdpo", {"beta": 0.05})
    losses = get("bdpo").function(pairs, options)      # PairLogProbs -> PairLosses, every tensor [P]

To add one: a file like `dpo.py` with a `SPEC`, and its line below; from another package, see `registry`.
"""

from megatron_bdpo.losses import (
    alphapo,
    apo,
    bco_pair,
    bdpo,
    cpo,
    discopop,
    dpo,
    dpop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    orpo,
    robust,
    safedpo,
    sft,
    sigmoid_norm,
    simpo,
    sppo_hard,
)
from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, PairLossFunction, Requirements
from megatron_bdpo.losses.options import LossOptions, Range, option
from megatron_bdpo.losses.registry import OptionField, all_specs, build_options, get, names, option_fields, register

for _spec in (
    alphapo.SPEC,
    apo.ZERO,
    apo.DOWN,
    bco_pair.SPEC,
    bdpo.SPEC,
    cpo.SPEC,
    discopop.SPEC,
    dpo.SPEC,
    dpop.SPEC,
    exo_pair.SPEC,
    hinge.SPEC,
    ipo.SPEC,
    nca_pair.SPEC,
    orpo.SPEC,
    robust.SPEC,
    safedpo.SPEC,
    sft.SPEC,
    sigmoid_norm.SPEC,
    simpo.SPEC,
    sppo_hard.SPEC,
):
    register(_spec)

__all__ = [
    "LossOptions",
    "LossSpec",
    "OptionField",
    "PairLogProbs",
    "PairLossFunction",
    "PairLosses",
    "Range",
    "Requirements",
    "all_specs",
    "build_options",
    "get",
    "names",
    "option",
    "option_fields",
    "register",
]
