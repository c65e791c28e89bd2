"""What goes with many losses beside their own options: another divergence than DPO's, or no reference at all.

A loss of a difference compares the two answers' scores. They are log-ratios, Delta_i = log t_i, unless the options say:

    --f-divergence F      f'(t_i),  t_i = pi_theta(y_i|x) / pi_ref(y_i|x)

        reverse_kl        log t                               DPO's own
        forward_kl        1 - 1/t
        js_divergence     log(2 t / (1 + t))
        alpha_divergence  (1 - t^-a) / a                      a = 1 - f_alpha_divergence_coef; towards 0 reverse_kl

    --reference-free      log pi_theta(y_i|x): as if the reference found all answers alike. Nobody scores one

f' is that of the paper's f plus the constant that makes f'(1) = 0, which a difference does not see (one of scores per
token does: there this is TRL's form). Exponents are cut at 80, as TRL cuts alpha's: an answer whose t^-a is larger
pushes no further. Rewards are beta times the scores; TRL logs beta Delta_i whatever the divergence.

Only losses that compare the scores of two answers have these options (`LossSpec.of_difference`): where a loss looks at
each score by itself, as `nca_pair` does, a constant is not all the same.

Source: f-DPO, arXiv 2309.16240, table 1; the names, and the coefficient as 1 - the paper's alpha, are TRL's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.base import AnyLossSpec, PairLogProbs, PairLosses, Requirements
from megatron_bdpo.losses.options import SHARE, LossOptions, flag, modifier, shown
from megatron_bdpo.losses.terms import log_ratios


@dataclass(frozen=True)
class ScoreOptions(LossOptions):
    """What a loss of a difference compares."""

    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = modifier(
        "reverse_kl", "divergence from the reference that reward is traded for", only_with=("reference_free", False)
    )
    f_alpha_divergence_coef: float = modifier(
        0.5,
        "of --f-divergence alpha_divergence, 1 - the paper's alpha: at 0 it is forward_kl, at 1 reverse_kl",
        SHARE,
        only_with=("f_divergence", "alpha_divergence"),
    )
    reference_free: bool = modifier(False, "compare the policy's own log-probs; no reference is scored")


#: Where e^x is still far from the largest fp32.
_LARGEST_EXPONENT = 80.0


def divergence_score(log_ratio: Tensor, options: ScoreOptions) -> Tensor:
    """f'(t) of log t, [P] each."""
    if options.f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    a = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(options.f_divergence, 1 - options.f_alpha_divergence_coef)
    return log_ratio if a == 0 else -torch.expm1((-a * log_ratio).clamp(max=_LARGEST_EXPONENT)) / a


def scored(pairs: PairLogProbs, options: ScoreOptions) -> PairLogProbs:
    """The pairs with what the loss is to compare; log-ratios need not be told."""
    if options.reference_free:
        return replace(pairs, chosen_score=pairs.policy_chosen, rejected_score=pairs.policy_rejected)
    if options.f_divergence == "reverse_kl":
        return pairs
    chosen, rejected = (divergence_score(each, options) for each in log_ratios(pairs))
    return replace(pairs, chosen_score=chosen, rejected_score=rejected)


def modified(spec: AnyLossSpec) -> AnyLossSpec:
    """The loss with the options of this module that go with it, behind its own.

    Raises:
        UserError: it has an option of such a name itself.
    """
    if not spec.of_difference:
        return spec
    own = spec.function

    @functools.wraps(own)
    def function(pairs: PairLogProbs, options: Any) -> PairLosses:
        return own(scored(pairs, options), options)

    def requirements(options: Any) -> Requirements:
        needs = spec.requirements(options)
        return replace(needs, reference=needs.reference and not options.reference_free)

    return replace(spec, function=function, options=_options(spec, ScoreOptions), requirements=requirements)


def _options(spec: AnyLossSpec, added: type) -> type:
    """A type that has the fields of the loss's own options, which it is a subclass of, and behind them the added."""
    own = spec.options
    if taken := {each.name for each in fields(own)} & {each.name for each in fields(added)}:
        name = flag(min(taken))
        raise UserError(f"the loss '{spec.name}' has an option {name}, which losses of its kind are given. Rename it")
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__repr__": shown}
    made: type = dataclass(frozen=True, repr=False)(type(own.__name__, (added, own), names))
    return made
