"""The options of a loss: a frozen dataclass whose fields carry their own help text and range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from megatron_bdpo.errors import UserError


class Range(NamedTuple):
    """The admissible values of a numeric option, and how to say so. NaN is in no range."""

    text: str
    contains: Callable[[Any], bool]


#: Far beyond what anybody means, and far enough from where fp32 overflows: loss and gradient are proportional to them.
LARGEST = 10_000
#: Nats: comprehension is no more exact than this, so a lower temperature would balance rounding.
COLDEST = 1e-4

POSITIVE = Range(f"above 0 and at most {LARGEST:,}", lambda value: 0 < value <= LARGEST)
NON_NEGATIVE = Range(f"at least 0 and at most {LARGEST:,}", lambda value: 0 <= value <= LARGEST)
TEMPERATURE = Range(f"at least {COLDEST:g} (inf is allowed)", lambda value: value >= COLDEST)
BOUNDED = Range(f"between -{LARGEST:,} and {LARGEST:,}", lambda value: -LARGEST <= value <= LARGEST)
UP_TO_1 = Range("> 0 and <= 1", lambda value: 0 < value <= 1)
SHARE = Range(">= 0 and <= 1", lambda value: 0 <= value <= 1)
BELOW_HALF_NOT_0 = Range("> 0 and < 0.5", lambda value: 0 < value < 0.5)
BELOW_HALF = Range(">= 0 and < 0.5", lambda value: 0 <= value < 0.5)


def option(default: Any, help: str, within: Range | None = None, only_with: tuple[str, object] | None = None) -> Any:
    """A dataclass field with its help text and range.

    Args:
        only_with: another field and its value, without which this one would be ignored: then it is refused.
    """
    return field(default=default, metadata={"help": help, "within": within, "only_with": only_with})


def modifier(default: Any, help: str, within: Range | None = None, only_with: tuple[str, object] | None = None) -> Any:
    """An `option` that many losses have (`modifiers`), told where it is not at its default."""
    metadata = {"help": help, "within": within, "is_modifier": True, "only_with": only_with}
    return field(default=default, metadata=metadata)


def beta(default: float = 0.1) -> Any:
    """The `beta` that every loss but ORPO and SFT has."""
    return option(default, "strength of the preference term: scales the log-ratios (or log-probs)", POSITIVE)


def label_smoothing(default: float = 0.0) -> Any:
    """The share of labels taken to be flipped: cDPO's and rDPO's epsilon."""
    return option(default, "assumed share of pairs whose chosen and rejected are swapped", BELOW_HALF)


def nll_weight(default: float = 0.0) -> Any:
    """The weight of the NLL term (`terms.add_nll`)."""
    return option(default, "weight of the chosen response's negative log-likelihood, mean per token", NON_NEGATIVE)


def flag(name: str) -> str:
    """The command-line flag of an option field: `nll_weight` -> `--nll-weight`."""
    return "--" + name.replace("_", "-")


class FieldType(NamedTuple):
    """An option field's value type, and the allowed strings where its annotation is a `Literal`."""

    type: type
    choices: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()
    """Strings that may stand in the place of a number: `float | Literal["auto"]`."""


_known: WeakKeyDictionary[type, Mapping[str, FieldType]] = WeakKeyDictionary()  # annotations are slow to read


def field_types(options: type) -> Mapping[str, FieldType]:
    """The value types of an options dataclass by field name. Raises UserError for one that no flag can carry."""
    if options not in _known:
        hints = get_type_hints(options)
        types = {f.name: _field_type(options, f.name, hints[f.name]) for f in fields(options)}
        _known[options] = MappingProxyType(types)
    return _known[options]


def _field_type(options: type, name: str, hint: Any) -> FieldType:
    if hint in (float, int, bool, str):
        return FieldType(hint)
    choices = get_args(hint)
    if get_origin(hint) is Literal and all(isinstance(choice, str) for choice in choices):
        return FieldType(str, choices)
    if get_origin(hint) in (Union, UnionType) and len(choices) == 2 and choices[0] in (float, int):
        words = _field_type(options, name, choices[1])
        if words.choices:
            return FieldType(choices[0], words=words.choices)
    raise UserError(
        f"{options.__module__}.{options.__qualname__}.{name}: an option of a loss has to be float, int, bool, str, "
        f"Literal[<strings>], or float or int or such a Literal, not {hint!r}"
    )


def open_options(options: Any) -> tuple[str, ...]:
    """Names of the options that a word leaves open, to be settled by the data."""
    types = field_types(type(options))
    return tuple(f.name for f in fields(options) if getattr(options, f.name) in types[f.name].words)


def told(options: Any) -> dict[str, Any]:
    """The options by name, without modifiers that are as they are by default."""
    values = {each: getattr(options, each.name) for each in fields(options)}
    return {
        each.name: value
        for each, value in values.items()
        if not (each.metadata.get("is_modifier") and value == each.default)
    }


def shown(options: Any) -> str:
    """As a dataclass shows itself, in the same words as before an option that is not set was added: checkpoints hold
    them."""
    values = ", ".join(f"{name}={value!r}" for name, value in told(options).items())
    return f"{type(options).__qualname__}({values})"


@dataclass(frozen=True)
class LossOptions:
    """Base of options dataclasses: checks each value's type, choices and range. Raises UserError naming the flag."""

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for f in fields(self):
            problem = _problem(getattr(self, f.name), types[f.name], f.metadata.get("within"))
            if problem:
                raise UserError(f"{flag(f.name)} {problem}, got {getattr(self, f.name)!r}. The default is {f.default}.")


def _problem(value: object, wanted: FieldType, within: Range | None) -> str | None:
    """What is wrong with an option's value, as the end of a sentence; None if nothing is."""
    if value in wanted.words:
        return None
    accepted = (float, int) if wanted.type is float else wanted.type
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted.type is not bool):
        return " or ".join([f"must be of type {wanted.type.__name__}", *wanted.words])
    if wanted.choices is not None and value not in wanted.choices:
        return f"must be one of {', '.join(wanted.choices)}"
    if within is not None and not within.contains(value):
        return f"must be {within.text}"
    return None
