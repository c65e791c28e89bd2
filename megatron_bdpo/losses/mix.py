"""A weighted sum of losses of one pair: `bdpo=1.0,sft=0.2,bco_pair=0.5`.

    L = sum_k weight_k L_k

An option is that of every term that has it: `--beta` is one for all; where their defaults differ, each keeps its own
until it is given. `nll_weight` is no option of a mix, of which `sft` is a term; a term keeps its default.

Source: MPO, arXiv 2411.10442, eq. 1, which sums DPO, BCO and SFT; TRL's `loss_type` and `loss_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass, replace
from typing import Any, Literal, NamedTuple

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.base import AnyLossSpec, LossSpec, PairLogProbs, PairLosses, Requirements, Takes, keep_all
from megatron_bdpo.losses.options import LossOptions, field_types, shown

#: In the place of a number: each term's own default.
OWN = "own"


#: What the losses are of that cannot be terms, and the way out.
_NO_TERMS: dict[Takes, tuple[str, str]] = {
    "groups": ("all answers to a prompt", "Train with it alone; its --nll-weight adds supervised fine-tuning."),
    "answers": ("labelled answers, each by itself", "Train with it alone."),
}


class Term(NamedTuple):
    """A loss of a mix, and its weight."""

    weight: float
    spec: AnyLossSpec

    def options(self, mixed: Any) -> Any:
        """Its options among those of the mix."""
        given = {each.name: getattr(mixed, each.name, OWN) for each in fields(self.spec.options)}
        return self.spec.options(**{name: value for name, value in given.items() if value != OWN})


def is_mix(name: str) -> bool:
    """Whether it names several losses, or one with a weight."""
    return "=" in name or "," in name


def mix(name: str, get: Callable[[str], AnyLossSpec]) -> AnyLossSpec:
    """The weighted sum that a text like `dpo=1,sft=0.2` names.

    Args:
        get: a loss by its name.

    Raises:
        UserError: a term is no loss, has no weight above 0, comes twice, selects pairs, or is not of pairs.
    """
    terms = [_term(text.strip(), name, get) for text in name.split(",")]
    names = [term.spec.name for term in terms]
    if len(set(names)) < len(names):
        raise UserError(f"--preference-loss {name}: a loss comes twice. Add its weights up.")

    def mixed(pairs: PairLogProbs, options: Any) -> PairLosses:
        """The sum per pair, [P]; rewards of the first term. Metrics: the terms', and `loss/NAME`, their shares."""
        found = [replace(each, loss=weight * each.loss) for weight, each in _each(terms, pairs, options)]
        total = sum((each.loss for each in found[1:]), found[0].loss)
        metrics = {key: value for each in reversed(found) for key, value in each.metrics.items()}
        shares = {f"loss/{key}": each.loss.detach() for key, each in zip(names, found, strict=True)}
        return replace(found[0], loss=total, metrics=metrics | shares)

    return LossSpec(
        name=name,
        function=mixed,
        options=_options(terms),
        requirements=lambda options: _requirements(terms, options),
        summary=f"weighted sum of {', '.join(names)}",
        source="; ".join(term.spec.source for term in terms),
        step_targets=_step_targets(terms, name),
    )


def _step_targets(terms: list[Term], name: str) -> Callable[[PairLogProbs, Any], Any] | None:
    """That of the term that looks at steps, if one does."""
    looking = [(term, term.spec.step_targets) for term in terms if term.spec.step_targets]
    if not looking:
        return None
    if len(looking) > 1:
        raise UserError(f"--preference-loss {name}: more than one term sorts the pairs of a step. Keep one.")
    term, targets = looking[0]
    return lambda pairs, options: targets(pairs, term.options(options))


def _each(terms: list[Term], pairs: PairLogProbs, options: Any) -> list[tuple[float, PairLosses]]:
    return [(term.weight, term.spec.function(pairs, term.options(options))) for term in terms]


def _term(text: str, name: str, get: Callable[[str], AnyLossSpec]) -> Term:
    loss, _, weight = (part.strip() for part in text.partition("="))
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"--preference-loss {name}: '{text}' has no weight above 0. "
            "Write LOSS=WEIGHT,LOSS=WEIGHT, as in dpo=1,sft=0.2."
        )
    spec = get(loss)
    if spec.select is not keep_all:
        raise UserError(f"--preference-loss {name}: '{loss}' swaps and drops pairs by labels. Train with it alone.")
    if spec.takes != "pairs":
        what, way_out = _NO_TERMS[spec.takes]
        raise UserError(f"--preference-loss {name}: '{loss}' is a loss of {what}, and a mix is of pairs. {way_out}")
    return Term(number, spec)


def _options(terms: list[Term]) -> type:
    """The union of the terms' options. What the data would have to settle takes numbers alone."""
    known: dict[str, tuple[Any, Any]] = {}
    for term in terms:
        types = field_types(term.spec.options)
        for each in fields(term.spec.options):
            kind = types[each.name]
            hint = Literal[kind.choices] if kind.choices else kind.type
            if each.name in known and known[each.name][1].default != each.default:
                told = {**each.metadata, "help": f"{each.metadata.get('help', '')}; {OWN}: each term's default"}
                known[each.name] = (kind.type | Literal[OWN], field(default=OWN, metadata=told))
            elif each.name != "nll_weight":
                known[each.name] = (hint, field(default=each.default, metadata=each.metadata))
    return make_dataclass(
        "Mix",
        [(key, *value) for key, value in known.items()],
        bases=(LossOptions,),
        namespace={"__repr__": shown},
        frozen=True,
        repr=False,
        module=__name__,
    )


def _requirements(terms: list[Term], options: Any) -> Requirements:
    """What any term reads."""
    needs = [term.spec.requirements(term.options(options)) for term in terms]
    return Requirements(**{each.name: any(getattr(need, each.name) for need in needs) for each in fields(Requirements)})
