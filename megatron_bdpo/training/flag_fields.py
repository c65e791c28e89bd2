"""Fields of settings that become flags, where their types do not say all of it, and what their values are read by."""

import argparse
import math
from dataclasses import field
from typing import Any


def flag(default: Any = None, **keywords: Any) -> Any:
    """A field whose flag is more than its type says: ``keywords`` are argparse's."""
    return field(default=default, metadata={"argparse_meta": keywords})


def switch(name: str, default: bool | None) -> Any:
    """A field with a flag and its --no-... form."""
    return flag(default, arg_names=[f"--{name}"], action=argparse.BooleanOptionalAction)


def minutes(text: str) -> float:
    """Of ``90s``, ``20m``, ``1.5h`` or a number of minutes."""
    unit = {"s": 1 / 60, "m": 1.0, "h": 60.0}.get(text[-1:])
    number = float(text[:-1] if unit else text) * (unit or 1.0)
    if not 0 <= number < math.inf:
        raise ValueError
    return number


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number
