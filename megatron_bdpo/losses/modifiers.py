"""What goes with many losses beside their own options: another divergence than DPO's, no reference, weights of pairs.

A loss of a difference compares the two answers' scores. They are log-ratios, Delta_i = log t_i, unless the options say:

    --f-divergence F      f'(t_i),  t_i = pi_theta(y_i|x) / pi_ref(y_i|x)

        reverse_kl        log t                               DPO's own
        forward_kl        1 - 1/t
        js_divergence     log(2 t / (1 + t))
        alpha_divergence  (1 - t^-a) / a                      a = 1 - f_alpha_divergence_coef; towards 0 reverse_kl

    --reference-free      log pi_theta(y_i|x): as if the reference found all answers alike. Nobody scores one

    --ld-alpha ALPHA      of the longer answer, the tokens behind the length of the shorter one count ALPHA (LD-DPO):
                          log pi(y_i) -> sum over t <= m of log pi(y_i,t) + ALPHA sum over t > m,  m = min(|y_w|, |y_l|)
                          of policy and reference. 1 is no difference, at 0 the common lengths alone are compared

f' is that of the paper's f plus the constant that makes f'(1) = 0, which a difference does not see (one of scores per
token does: there this is TRL's form). Exponents are cut at 80, as TRL cuts alpha's: an answer whose t^-a is larger
pushes no further. Rewards are beta times the scores; TRL logs beta Delta_i whatever the divergence.

Only losses that compare the scores of two answers have these options (`LossSpec.of_difference`): where a loss looks at
each score by itself, as `nca_pair` does, a constant is not all the same, and LD-DPO's argument, that of two answers the
longer one moves the difference more, is not about it. Scores per token are divided by all of |y_i|, as in TRL; NLL and
weights are of whole answers.

Every loss of pairs has

    --use-weighting       L -> w_w w_l L,   w_i = exp(1/|y_i| sum_t log(pi_theta(y_i,t) / sum_v pi_theta(v)^2))

w carries no gradient. It is large where the policy itself would give such an answer, so that pairs of other models are
made to count as its own would. It takes one more sum over the vocabulary in the pass that makes the log-probs, and no
other pass.

Sources: f-DPO, arXiv 2309.16240, table 1; the names, and the coefficient as 1 - the paper's alpha, are TRL's. LD-DPO,
arXiv 2409.06411, in the form of TRL, which lets every loss have it. WPO, arXiv 2406.11827, its sampled alignment, as in
TRL.
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
from megatron_bdpo.losses.terms import log_ratios, required


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
    ld_alpha: float = modifier(
        1.0, "what a token of the longer answer counts that is behind the length of the shorter one (LD-DPO)", SHARE
    )


@dataclass(frozen=True)
class WeightOptions(LossOptions):
    """Of every loss of pairs: how much a pair counts."""

    use_weighting: bool = modifier(False, "weigh each pair by how likely its answers are under the policy (WPO)")


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
    counted = _desensitized(pairs, options) if options.ld_alpha < 1 else pairs
    if options.reference_free:
        return replace(pairs, chosen_score=counted.policy_chosen, rejected_score=counted.policy_rejected)
    if options.f_divergence == "reverse_kl" and options.ld_alpha == 1:
        return pairs
    chosen, rejected = (divergence_score(each, options) for each in log_ratios(counted))
    return replace(pairs, chosen_score=chosen, rejected_score=rejected)


def _desensitized(pairs: PairLogProbs, options: ScoreOptions) -> PairLogProbs:
    """The log-probs of LD-DPO: of what an answer has behind the pair's common length, a share."""

    def counted(whole: Tensor | None, beginning: Tensor | None) -> Tensor:
        common = required(beginning, "*_beginning")
        return common + options.ld_alpha * (required(whole, "reference_*") - common)

    chosen = counted(pairs.policy_chosen, pairs.policy_chosen_beginning)
    rejected = counted(pairs.policy_rejected, pairs.policy_rejected_beginning)
    policy = replace(pairs, policy_chosen=chosen, policy_rejected=rejected)
    if pairs.reference_chosen is None:
        return policy
    chosen = counted(pairs.reference_chosen, pairs.reference_chosen_beginning)
    rejected = counted(pairs.reference_rejected, pairs.reference_rejected_beginning)
    return replace(policy, reference_chosen=chosen, reference_rejected=rejected)


def weighted(losses: PairLosses, pairs: PairLogProbs) -> PairLosses:
    """The losses times w_w w_l, which is the metric `weighting`."""
    chosen = pairs.policy_chosen + required(pairs.chosen_collision_entropy, "chosen_collision_entropy")
    rejected = pairs.policy_rejected + required(pairs.rejected_collision_entropy, "rejected_collision_entropy")
    weight = (chosen / pairs.chosen_tokens + rejected / pairs.rejected_tokens).detach().exp()
    return replace(losses, loss=losses.loss * weight, metrics={**losses.metrics, "weighting": weight})


def modified(spec: AnyLossSpec) -> AnyLossSpec:
    """The loss with the options of this module that go with it, behind its own: only losses of pairs have any.

    Raises:
        UserError: it has an option of such a name itself.
    """
    if spec.takes != "pairs":
        return spec
    own = spec.function

    @functools.wraps(own)
    def function(pairs: PairLogProbs, options: Any) -> PairLosses:
        losses = own(scored(pairs, options) if spec.of_difference else pairs, options)
        return weighted(losses, pairs) if options.use_weighting else losses

    def requirements(options: Any) -> Requirements:
        needs = replace(spec.requirements(options), collision_entropy=options.use_weighting)
        if not spec.of_difference:
            return needs
        reference = needs.reference and not options.reference_free
        return replace(needs, reference=reference, beginnings=options.ld_alpha < 1)

    return replace(spec, function=function, options=_options(spec), requirements=requirements)


def _options(spec: AnyLossSpec) -> type:
    """A subclass of the loss's own options that has more fields, behind those."""
    added = (WeightOptions, ScoreOptions) if spec.of_difference else (WeightOptions,)
    if taken := {each.name for each in fields(spec.options)} & {each.name for some in added for each in fields(some)}:
        name = flag(min(taken))
        raise UserError(f"the loss '{spec.name}' has an option {name}, which losses are given anyway. Rename it")
    own: Any = spec.options
    made: type = _joined(own, added)
    return made


@functools.cache
def _joined(own: Any, added: tuple[Any, ...]) -> type:
    """One type for the same types: its values are sent between ranks."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__repr__": shown}

    def reduce(options: Any) -> tuple[Any, ...]:
        return _restored, (own, added, {each.name: getattr(options, each.name) for each in fields(options)})

    bases = (*added, own)
    made: type = dataclass(frozen=True, repr=False)(type(own.__name__, bases, {**names, "__reduce__": reduce}))
    return made


def _restored(own: type, added: tuple[type, ...], values: dict[str, Any]) -> Any:
    """Pickled options, which have no name that they could be found by."""
    return _joined(own, added)(**values)
