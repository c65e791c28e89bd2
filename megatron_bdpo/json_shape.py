"""JSON that somebody else may have written or damaged: read, and looked at before its parts are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST = 2**63 - 1


def parse_json(content: bytes | str) -> Any:
    """Like ``json.loads``, whose one more exception, for nesting too deep, is a ValueError too here.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@dataclass(frozen=True)
class Each:
    """An object with any names, whose values are all of one shape."""

    shape: Any


@dataclass(frozen=True)
class Maybe:
    """null, or a value of this shape."""

    shape: Any


def is_count(value: Any) -> bool:
    """A whole number from 0 to what 64 bits hold."""
    return type(value) is int and 0 <= value <= _MOST


def is_number(value: Any) -> bool:
    """A number, whole or not."""
    return type(value) in (int, float)


def schema_error(value: Any, shape: Any, name: str = "it") -> str:
    """What is wrong with a value, as 'arrays.tokens.rows is "x"'; empty where it has the shape.

    Args:
        value: as ``parse_json`` gives it.
        shape: a type; a function that says whether a value is right; ``[shape]``, a list of such; a mapping of names to
            shapes, all of which must be there, beside any others; ``Each`` and ``Maybe``.
        name: of the value.
    """
    inner = "" if name == "it" else f"{name}."
    right = True
    parts: list[tuple[str, Any, Any]] = []  # name, value, shape
    if isinstance(shape, Maybe):
        return "" if value is None else schema_error(value, shape.shape, name)
    if isinstance(shape, Each):
        right = isinstance(value, dict)
        parts = [(key, item, shape.shape) for key, item in value.items()] if right else []
    elif isinstance(shape, Mapping):
        right = isinstance(value, dict)
        if right and (absent := [key for key in shape if key not in value]):
            return f"{inner}{absent[0]} is missing"
        parts = [(key, value[key], part) for key, part in shape.items()] if right else []
    elif isinstance(shape, list):
        right = isinstance(value, list)
        parts = [(str(index), item, shape[0]) for index, item in enumerate(value)] if right else []
    elif isinstance(shape, type):
        right = type(value) is shape
    else:
        right = shape(value)
    if not right:
        text = repr(value)
        return f"{name} is {text if len(text) <= 60 else text[:60] + '...'}"
    return next((wrong for key, item, part in parts if (wrong := schema_error(item, part, inner + key))), "")
