"""The losses by name: the built-in ones, those that installed packages offer, and one in a file of the user's.

Each has the options of `modifiers` that go with it.

A package adds a loss through the entry-point group `megatron_bdpo.losses`. In its pyproject.toml:

    [project.entry-points."megatron_bdpo.losses"]
    my_loss = "my_package.losses:SPEC"          # a LossSpec whose name is my_loss
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, get_args

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.base import AnyLossSpec, LossSpec, Takes
from megatron_bdpo.losses.loss_file import FLAG, LossFile, read_loss_file, try_loss
from megatron_bdpo.losses.mix import is_mix, mix
from megatron_bdpo.losses.modifiers import modified
from megatron_bdpo.losses.options import field_types, flag

ENTRY_POINT_GROUP = "megatron_bdpo.losses"

_registered: dict[str, AnyLossSpec] = {}

_file: LossFile | None = None


class _Plugin(NamedTuple):
    spec: AnyLossSpec
    provider: str


def register(spec: AnyLossSpec) -> None:
    """Make a loss available in this process. Raises UserError for a taken name or a spec that cannot be used."""
    _check(spec)
    if spec.name in _registered:
        raise UserError(f"the loss name '{spec.name}' is taken; choose another one")
    _registered[spec.name] = modified(spec)


def use_file(path: str | None) -> LossFile | None:
    """Make the loss of a file available in this process, in the place of that of an earlier one; None: of none.

    Raises:
        UserError: its name is taken, or it cannot be used; the message names the file.
    """
    global _file
    _file = None
    if path is None:
        return None
    file = read_loss_file(path)
    try:
        _check(file.spec)
        if file.spec.name in names():
            raise UserError(f"the loss name '{file.spec.name}' is taken. Choose another one")
        try_loss(file)
        _file = file = replace(file, spec=modified(file.spec))
        option_fields()  # one name of an option has one type in all losses
    except (UserError, NameError) as error:  # NameError: of types that the file's annotations name
        _file = None
        told = str(error)
        raise UserError(told if told.startswith(FLAG) else f"{FLAG} {path}: {told}.") from error
    return file


def file_of(name: str) -> LossFile | None:
    """The file that a loss is from, if it is from one."""
    return _file if _file and _file.spec.name == name else None


def all_specs() -> tuple[AnyLossSpec, ...]:
    """Every loss, built-in, third-party and of a file, by name. The first call loads the entry points.

    Raises:
        UserError: an entry point cannot be used, or its name is taken; the message names its distribution.
    """
    plugins = _plugins()
    for name in plugins.keys() & _registered.keys():
        raise UserError(f"{plugins[name].provider} offers a loss '{name}', but that name is taken: uninstall it")
    specs = _registered | {name: plugin.spec for name, plugin in plugins.items()}
    if _file:
        specs[_file.spec.name] = _file.spec
    return tuple(specs[name] for name in sorted(specs))


def names() -> tuple[str, ...]:
    """The names of all losses, sorted."""
    return tuple(spec.name for spec in all_specs())


def get(name: str) -> AnyLossSpec:
    """The loss of that name, or the mix (`losses.mix`). Raises UserError with the known names if there is none."""
    if is_mix(name):
        return mix(name, get)
    specs = {spec.name: spec for spec in all_specs()}
    if name not in specs:
        for spec in specs.values():
            if name in spec.elsewhere:
                raise UserError(f"unknown loss '{name}'. What other trainers call {name} is '{spec.name}' here.")
        raise UserError(f"unknown loss '{name}'{_did_you_mean(name, specs)} Known losses: {', '.join(specs)}")
    return specs[name]


def build_options(name: str, given: Mapping[str, object]) -> Any:
    """The options of loss `name`, with the values that the user set explicitly.

    Args:
        name: the loss.
        given: values by field name. What is absent keeps the loss's own default.

    Returns:
        An instance of the loss's options dataclass.

    Raises:
        UserError: the loss is unknown, does not use a given option (perhaps beside the others), or a value is out of
            range.
    """
    spec = get(name)
    used = {f.name for f in fields(spec.options)}
    for key in given:
        if key not in used:
            raise UserError(_unused(key, spec))
    options = spec.options(**given)
    for f in fields(options):
        other, value = f.metadata.get("only_with") or (f.name, getattr(options, f.name))
        if getattr(options, f.name) != f.default and getattr(options, other) != value:
            raise UserError(_ignored(f.name, other, value))
    return options


@dataclass(frozen=True)
class OptionField:
    """An option as the command line sees it: one flag for all losses that have a field of this name."""

    name: str
    type: type
    """float, int, bool or str"""
    help: str
    defaults: dict[str, object]
    """The default per loss that uses the option: they may differ, so the flag itself has none."""
    choices: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()
    """What may stand in the place of a number."""
    is_modifier: bool = False
    """Of many losses alike: see `losses.modifiers`."""

    @property
    def flag(self) -> str:
        return flag(self.name)


def option_fields(specs: Iterable[AnyLossSpec] | None = None) -> dict[str, OptionField]:
    """The union of the options of these losses, or of all, by field name, in order of first use.

    Raises:
        UserError: two losses have a field of one name and different types.
    """
    union: dict[str, OptionField] = {}
    for spec in all_specs() if specs is None else specs:
        types = field_types(spec.options)
        for f in fields(spec.options):
            kind = types[f.name]
            help, is_modifier = f.metadata.get("help", ""), f.metadata.get("is_modifier", False)
            seen = union.setdefault(f.name, OptionField(f.name, kind.type, help, {}, *kind[1:], is_modifier))
            if (seen.type, seen.choices, seen.words) != kind:
                raise UserError(
                    f"{seen.flag} has other values for the loss '{next(iter(seen.defaults))}' than for '{spec.name}': "
                    "an option of one name has to have one type and the same choices"
                )
            seen.defaults[spec.name] = f.default
    return union


@cache
def _plugins() -> dict[str, _Plugin]:
    found: dict[str, _Plugin] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        plugin = _load(point)
        other = found.setdefault(point.name, plugin)
        if other is not plugin:
            raise UserError(f"{plugin.provider} and {other.provider} both offer a loss '{point.name}': uninstall one")
    return found


def _load(point: EntryPoint) -> _Plugin:
    provider = f"distribution '{point.dist.name}'" if point.dist else "an unnamed distribution"
    try:
        spec = point.load()
        _check(spec)
        if spec.name != point.name:
            raise UserError(f"the loss calls itself '{spec.name}'; the two names have to agree")
        return _Plugin(modified(spec), provider)
    except Exception as error:  # third-party code may raise anything at import
        raise UserError(
            f"{provider} offers the loss '{point.name}' ({point.value}, entry-point group '{ENTRY_POINT_GROUP}'), but "
            f"it cannot be used: {type(error).__name__}: {error}. Repair or uninstall it"
        ) from error


def _check(spec: AnyLossSpec) -> None:
    if not isinstance(spec, LossSpec):
        raise UserError(f"a loss has to be a LossSpec, not {type(spec).__name__}")
    _check_kind(spec)
    options = spec.options
    if not (isinstance(options, type) and is_dataclass(options) and options.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UserError(f"the options of loss '{spec.name}' have to be a frozen dataclass type, not {options!r}")
    for f in fields(options):
        if f.default is MISSING:
            raise UserError(f"the option {flag(f.name)} of loss '{spec.name}' has no default")
    field_types(options)


#: Field of a spec that not every loss may have -> what those take that may.
_ONLY_OF: dict[str, tuple[Takes, ...]] = {
    "of_difference": ("pairs",),
    "step_targets": ("pairs",),
    "select": ("pairs", "groups"),
    "settle": ("pairs", "groups"),
    "step_shift": ("answers",),
    "advise": ("answers",),
}


def _check_kind(spec: AnyLossSpec) -> None:
    """What a loss takes, and what goes with that."""
    if spec.takes not in get_args(Takes):
        raise UserError(f"the loss '{spec.name}' takes {spec.takes!r}. Say one of: {', '.join(get_args(Takes))}")
    defaults = {each.name: each.default for each in fields(spec)}
    for name, kinds in _ONLY_OF.items():
        if spec.takes not in kinds and getattr(spec, name) != defaults[name]:
            only = " or ".join(kinds)
            raise UserError(
                f"the loss '{spec.name}' takes {spec.takes}, and {name} is for losses of {only}. Leave it out"
            )


def _unused(key: str, spec: AnyLossSpec) -> str:
    used = [f.name for f in fields(spec.options)]
    known = option_fields()
    if key in known:
        where = f"It is an option of: {', '.join(known[key].defaults)}."
    else:
        where = f"No loss uses it{_did_you_mean(flag(key), map(flag, known))}"
    return f"{flag(key)} is not used by the loss '{spec.name}', which uses: {', '.join(map(flag, used))}. {where}"


def _ignored(name: str, other: str, value: object) -> str:
    """Of an option that counts only while another one has some value."""
    if value is False:
        return f"{flag(name)} would be ignored with {flag(other)}. Leave one out."
    wanted = flag(other) if value is True else f"{flag(other)} {value}"
    return f"{flag(name)} would be ignored without {wanted}. Add it, or leave {flag(name)} out."


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."
