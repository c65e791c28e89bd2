"""Preference losses: pure functions of log-probs, of pairs, groups or labelled answers, and the registry of them.

    options = build_options("bdpo", {"beta": 0.05})
    losses = get("bdpo").function(pairs, options)      # PairLogProbs -> PairLosses, every tensor [P]

    losses = get("pl_dpo").function(groups, options)   # GroupLogProbs -> GroupLosses, where it takes groups

    losses = get("kto").function(answers, options)     # AnswerLogProbs -> AnswerLosses, where it takes answers

To add one: a file like `dpo.py` with a `SPEC`, and its line below; from another package, see `registry`.
"""

from megatron_bdpo.losses import (
    alphapo,
    aot,
    apo,
    apo_zero_unpaired,
    bco,
    bco_pair,
    bdpo,
    bdpo_list,
    cpo,
    discopop,
    dpo,
    dpop,
    exo_pair,
    hinge,
    infonca,
    ipo,
    kto,
    lipo_lambda,
    nca,
    nca_pair,
    orpo,
    pl_dpo,
    robust,
    safedpo,
    sft,
    sigmoid_norm,
    simpo,
    sppo_hard,
    tpo,
)
from megatron_bdpo.losses.answers import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.base import LossFunction, LossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses
from megatron_bdpo.losses.options import LossOptions, Range, option
from megatron_bdpo.losses.registry import OptionField, all_specs, build_options, get, names, option_fields, register

for _spec in (
    alphapo.SPEC,
    aot.PAIRED,
    aot.UNPAIRED,
    apo.ZERO,
    apo.DOWN,
    apo_zero_unpaired.SPEC,
    bco.SPEC,
    bco_pair.SPEC,
    bdpo.SPEC,
    bdpo_list.SPEC,
    cpo.SPEC,
    discopop.SPEC,
    dpo.SPEC,
    dpop.SPEC,
    exo_pair.SPEC,
    hinge.SPEC,
    infonca.SPEC,
    ipo.SPEC,
    kto.SPEC,
    lipo_lambda.SPEC,
    nca.SPEC,
    nca_pair.SPEC,
    orpo.SPEC,
    pl_dpo.SPEC,
    robust.SPEC,
    safedpo.SPEC,
    sft.SPEC,
    sigmoid_norm.SPEC,
    simpo.SPEC,
    sppo_hard.SPEC,
    tpo.SPEC,
):
    register(_spec)

__all__ = [
    "AnswerLogProbs",
    "AnswerLosses",
    "GroupLogProbs",
    "GroupLosses",
    "LossFunction",
    "LossOptions",
    "LossSpec",
    "OptionField",
    "PairLogProbs",
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
