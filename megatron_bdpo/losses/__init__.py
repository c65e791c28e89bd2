"""Preference losses: pure functions of per-pair log-probs, and the registry that names them.

    options = build_options("bdpo", {"beta": 0.05})
    losses = get("bdpo").function(pairs, options)      # PairLogProbs -> PairLosses, every tensor [P]

To add one: a file like `dpo.py` with a `SPEC`, and its line below; from another package, see `registry`.
"""

from megatron_bdpo.losses import bdpo, cpo, dpo, hinge, ipo, orpo, robust, safedpo, simpo
from megatron_bdpo.losses.base import LossSpec, PairLogProbs, PairLosses, PairLossFunction, Requirements
from megatron_bdpo.losses.options import LossOptions, Range, option
from megatron_bdpo.losses.registry import OptionField, all_specs, build_options, get, names, option_fields, register

for _family in (bdpo, cpo, dpo, hinge, ipo, orpo, robust, safedpo, simpo):
    register(_family.SPEC)

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
