"""The JSON schema of recipes, by which editors complete and check them: recipes/recipe.schema.json.

Made of the table of all flags, and written with it by ``python tools/flag_table.py``. It refuses no recipe that a start
takes; some that a start refuses it cannot know: what depends on another flag, on the data or on the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bdpo.training.flags.flag_table import Flag, FlagTable
from megatron_bdpo.training.flags.recipe import NOT_IN_RECIPES

FILE = Path(__file__).resolve().parents[1] / "recipes" / "recipe.schema.json"

_VARIABLE = r"\$\{"
#: Python's numbers as text, for YAML takes 5e-7 for a string; underscores may stand between digits.
_DIGITS = "[0-9](_?[0-9])*"
_INTEGER = rf"^\s*[+-]?{_DIGITS}\s*$|{_VARIABLE}"
_NUMBER = (
    rf"^\s*[+-]?({_DIGITS}\.?({_DIGITS})?|\.{_DIGITS})([eE][+-]?{_DIGITS})?\s*$"
    rf"|^\s*[+-]?([iI][nN][fF]([iI][nN][iI][tT][yY])?|[nN][aA][nN])\s*$|{_VARIABLE}"
)
#: What one value may be, by the flag's type.
_ONE: dict[str | None, dict[str, Any]] = {
    "int": {"type": ["integer", "string"], "pattern": _INTEGER},
    "float": {"type": ["number", "string"], "pattern": _NUMBER},
    None: {"type": ["string", "number"]},
}
_NULL = {"type": "null"}  # a flag of an earlier recipe taken back


def schema(table: FlagTable) -> dict[str, Any]:
    """The schema, of draft 7, which all editors read."""
    properties: dict[str, Any] = {}
    for flag in (flag for flags in table.groups.values() for flag in flags):
        if not NOT_IN_RECIPES.isdisjoint(flag.names):
            continue
        name, *others = (name.removeprefix("--") for name in flag.all_names)
        properties[name] = _property(flag)
        for other in others:
            off = flag.kind == "switch" and other == f"no-{name}"
            properties[other] = _SWITCH | {"description": f"{name}: false"} if off else _same_as(name)
    losses = properties["preference-loss"]
    properties["preference-loss"] = {
        "anyOf": [{"enum": sorted(table.losses)}, {"type": ["string", "null"]}],
        **{key: value for key, value in losses.items() if key not in ("type", "anyOf")},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"A recipe of megatron_bdpo, with the flags of megatron-core {table.megatron}",
        "type": "object",
        "properties": properties,
        # A loss from elsewhere brings flags of its own.
        "if": {"anyOf": [{"required": ["loss-file"]}, _names_other_losses(table)]},
        "else": {"properties": dict.fromkeys(properties, True), "additionalProperties": False},
    }


_SWITCH = {"type": ["boolean", "null"]}


def _same_as(name: str) -> dict[str, Any]:
    return {"$ref": f"#/properties/{name}"}


def _property(flag: Flag) -> dict[str, Any]:
    told = {"description": flag.help} if flag.help else {}
    if flag.default is not None:
        told["default"] = flag.default
    return _values(flag) | told


def _values(flag: Flag) -> dict[str, Any]:
    if flag.kind not in ("value", "append"):
        return _SWITCH
    if flag.choices is None:
        one = _ONE[flag.type]
    else:
        one = {"anyOf": [{"enum": flag.choices}, {"type": "string", "pattern": _VARIABLE}]}
    if flag.nargs is None:
        return {"anyOf": [*one["anyOf"], _NULL]} if flag.choices else one | {"type": [*one["type"], "null"]}
    several: dict[str, Any] = {"type": "array", "items": one}
    if isinstance(flag.nargs, int):  # just so many, and one value alone is too few
        return {"anyOf": [several | {"minItems": flag.nargs, "maxItems": flag.nargs}, _NULL]}
    several |= {"+": {"minItems": 1}, "?": {"maxItems": 1}}.get(flag.nargs, {})
    return {"anyOf": [one, several, _NULL]}


def _names_other_losses(table: FlagTable) -> dict[str, Any]:
    """Of a recipe whose loss or mix holds a name that the table does not know."""
    term = rf"\s*({'|'.join(sorted(table.losses))})\s*(=[^,]*)?"
    known = {"type": "null"}, {"type": "string", "pattern": f"^{term}(,{term})*$"}
    return {"properties": {"preference-loss": {"not": {"anyOf": list(known)}}}, "required": ["preference-loss"]}


def text(table: FlagTable) -> str:
    """The file as it is to be."""
    return json.dumps(schema(table), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
