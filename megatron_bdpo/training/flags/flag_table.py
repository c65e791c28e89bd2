"""All flags of a training run, Megatron's and ours, from a file made of their parsers: neither has to be imported.

``flag_table.json`` is of one version of megatron-core, and of this package's losses. ``python tools/flag_table.py``
writes it anew, and a test compares it with the parsers.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("flag_table.json")

_TYPES = {"int": int, "float": float}

Kind = Literal["value", "append", "true", "false", "switch"]

_KINDS: dict[str, Kind] = {
    "_StoreAction": "value",
    "_AppendAction": "append",
    "_StoreTrueAction": "true",
    "_StoreFalseAction": "false",
    "BooleanOptionalAction": "switch",
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One argument, with all its names on the command line."""

    names: list[str]
    dest: str
    kind: Kind
    help: str
    nargs: str | int | None = None
    const: int | str | None = None
    """What stands for a value that is left out."""
    type: str | None = None
    """``int``, ``float``, or None for text and for types that only their parser knows."""
    choices: list[str] | None = None
    metavar: str | None = None
    default: Any = None
    """Of our flags; Megatron's depend on what is installed."""

    @property
    def all_names(self) -> list[str]:
        """Also those that switch it off."""
        return [*self.names, *(f"--no-{name[2:]}" for name in self.names if self.kind == "switch")]

    @property
    def usage(self) -> str:
        """The flag as it is typed: ``--lr X``."""
        if self.kind not in ("value", "append"):
            return self.names[0]
        number = {"int": "N", "float": "X"}.get(self.type or "", self.dest.upper())
        value = self.metavar or ("{" + ",".join(self.choices) + "}" if self.choices else number)
        return f"{self.names[0]} [{value}]" if self.nargs == "?" else f"{self.names[0]} {value}"


@dataclass(frozen=True)
class Loss:
    """What flags say about a loss."""

    options: list[str]
    """Argument names."""
    elsewhere: list[str]
    """Its names in other trainers."""


def terms(loss: str) -> list[str]:
    """The losses that ``--preference-loss`` names: one, or those of a mix (``losses.mix`` checks their weights)."""
    return [term.partition("=")[0].strip() for term in loss.split(",")]


@dataclass(frozen=True)
class FlagTable:
    """The contents of the file."""

    megatron: str
    """Version of megatron-core."""
    groups: dict[str, list[Flag]]
    """By title, in the parser's order."""
    losses: dict[str, Loss]

    @property
    def is_of_this_installation(self) -> bool:
        """Whether its flags are all that there are: of this version of Megatron, and no package adds losses."""
        try:
            found = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            return False
        return found == self.megatron and not importlib.metadata.entry_points(group="megatron_bdpo.losses")

    def options_of(self, loss: str) -> set[str]:
        """Argument names of the options of a loss that there is, or of a mix of such."""
        names = terms(loss)
        found = {option for name in names for option in self.losses[name].options}
        return found if names == [loss] else found - {"nll_weight"}

    def flags(self) -> dict[str, Flag]:
        """By argument name, the first of each."""
        found: dict[str, Flag] = {}
        for group in self.groups.values():
            for flag in group:
                found.setdefault(flag.dest, flag)
        return found

    def parser(self) -> argparse.ArgumentParser:
        """A parser that takes what the training run's own takes, and of a few types more than that."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for group in self.groups.values():
            for flag in group:
                parser.add_argument(*flag.names, **_keywords(flag))
        return parser


def _keywords(flag: Flag) -> dict[str, Any]:
    keywords: dict[str, Any] = {"dest": flag.dest, "default": flag.default}
    if flag.kind in ("true", "false"):
        return {"dest": flag.dest, "action": f"store_{flag.kind}"}
    if flag.kind == "switch":
        return {**keywords, "action": argparse.BooleanOptionalAction}
    if flag.kind == "append":
        keywords["action"] = "append"
    if flag.const is not None:
        keywords["const"] = flag.const
    return {**keywords, "nargs": flag.nargs, "type": _TYPES.get(flag.type or ""), "choices": flag.choices}


@functools.cache
def read() -> FlagTable:
    """The file's contents."""
    content = json.loads(FILE.read_text("utf-8"))
    groups = {title: [Flag(**flag) for flag in flags] for title, flags in content["groups"].items()}
    losses = {name: Loss(**loss) for name, loss in content["losses"].items()}
    return FlagTable(content["megatron-core"], groups, losses)


# Making it ------------------------------------------------------------------------------------------------------------


def described(parser: argparse.ArgumentParser, version: str, losses: Mapping[str, Loss], own: str) -> dict[str, Any]:
    """What the file is to hold.

    Args:
        parser: the training run's.
        version: of megatron-core.
        own: what the titles of our groups end with.
    """
    groups = {}
    for group in parser._action_groups:
        title = group.title or ""
        flags = [
            _flag(parser, action, with_default=title.endswith(own))
            for action in group._group_actions
            if action.option_strings and type(action).__name__ in _KINDS
        ]
        if flags:
            groups[title] = flags
    return {
        "megatron-core": version,
        "losses": {name: vars(loss) for name, loss in losses.items()},
        "groups": groups,
    }


def _flag(parser: argparse.ArgumentParser, action: argparse.Action, *, with_default: bool) -> dict[str, Any]:
    kind = _KINDS[type(action).__name__]
    names = list(action.option_strings)
    if kind == "switch":  # which makes its --no-... itself
        names = [name for name in names if not name.startswith("--no-")] or names
    takes_value = kind in ("value", "append")
    plain = takes_value and (action.type in (None, str) or action.type in _TYPES.values())
    choices = [str(choice) for choice in action.choices] if takes_value and action.choices is not None else None
    found = {
        "names": names,
        "dest": action.dest,
        "kind": kind,
        "help": " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else "",
        "nargs": action.nargs if takes_value else None,
        "const": action.const if takes_value else None,
        "type": next((name for name, kind in _TYPES.items() if action.type is kind), None),
        "choices": choices if plain and action.type not in _TYPES.values() else None,
        "metavar": action.metavar if isinstance(action.metavar, str) else None,
        "default": action.default if with_default else None,
    }
    return {name: value for name, value in found.items() if value is not None}
