"""Rotary settings of a ``config.json`` to Megatron's arguments and back: bases, parts of heads, scaled positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import Config
from megatron_bdpo.model.hf.kinds import is_number, pop_number, shown

#: What Megatron's code has in the place of Llama 3's settings, which it does not let choose.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def rope_arguments(values: Config) -> dict[str, Any]:
    """Megatron's arguments.

    Raises:
        UserError: a kind of scaling that Megatron does not have, or settings that it does not know.
    """
    rope = _rope_settings(values)
    kind = rope.pop("rope_type")
    arguments = {
        "rotary_base": _as_whole(pop_number(rope, "rope_theta")),
        "rotary_percent": float(rope.pop("partial_rotary_factor")),
        "use_rope_scaling": kind == "llama3",
        "rotary_seq_len_interpolation_factor": None,
    }
    if kind == "llama3":
        arguments["rope_scaling_factor"] = pop_number(rope, "factor")
        constants = {key: rope.pop(key, None) for key in _LLAMA3_CONSTANTS}
        beside = values.get("original_max_position_embeddings")  # goes before the one inside
        constants["original_max_position_embeddings"] = beside or constants["original_max_position_embeddings"]
        if constants != _LLAMA3_CONSTANTS:
            raise UserError(
                f"config.json: Llama 3's rotary scaling with {constants}. Megatron's code has {_LLAMA3_CONSTANTS}."
            )
    elif kind == "yarn":
        arguments |= _yarn_arguments(rope, values)
    elif kind == "longrope" and "max_position_embeddings" in values:
        arguments |= _longrope_arguments(rope, values)
    elif kind == "linear":
        arguments["rotary_seq_len_interpolation_factor"] = _as_whole(pop_number(rope, "factor"))
    elif kind != "default":
        raise UserError(
            f"config.json: rotary scaling of the kind '{kind}' is not mapped. Mapped: llama3, linear, yarn."
        )
    if rope:
        raise UserError(f"config.json: rotary settings {rope} are not known for the kind '{kind}'.")
    return arguments


def _longrope_arguments(rope: dict[str, Any], values: Config) -> dict[str, Any]:
    """Of rotary settings of the kind longrope, which are taken out of ``rope``; as transformers reads them.

    Sequences of up to the length before the extension have the short factors, longer ones the long factors. Here only
    the former are trained.
    """
    rope.pop("long_factor", None)
    short, original = rope.pop("short_factor", None), rope.pop("original_max_position_embeddings", None)
    original = original or values["original_max_position_embeddings"]
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rotated = int(head * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0)) // 2
    if not isinstance(short, list) or len(short) != rotated or not all(map(is_number, short)):
        raise UserError(f"config.json: longrope's short_factor must be {rotated} positive numbers, not {shown(short)}.")
    given, factor = rope.pop("attention_factor", None), rope.pop("factor", None)
    factor = factor or values["max_position_embeddings"] / original
    computed = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "rotary_factors": [float(each) for each in short],
        "rotary_attention_factor": float(given or computed),
        "rotary_factors_until": original,
    }


#: Of YaRN: the key inside the rotary settings, Megatron's argument, and what an absent key means to transformers.
_YARN = (
    ("beta_fast", "yarn_beta_fast", 32.0),
    ("beta_slow", "yarn_beta_slow", 1.0),
)


def _yarn_arguments(rope: dict[str, Any], values: Config) -> dict[str, Any]:
    """Of rotary settings of the kind yarn, which are taken out of ``rope``.

    Raises:
        UserError: naming what Megatron's YaRN does not compute.
    """
    factor = pop_number(rope, "factor")
    inside = rope.pop("original_max_position_embeddings", None)
    original = inside or values.get("original_max_position_embeddings")
    if type(original) is not int or original < 1:
        raise UserError("config.json: yarn's original_max_position_embeddings must be a positive whole number.")
    truncate = rope.pop("truncate", None)
    if truncate not in (True, False, None):
        raise UserError(f"config.json: yarn's truncate must be true or false, not {shown(truncate)}.")
    mscale, all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if not (mscale and all_dim):  # transformers reads the two together or not at all
        mscale, all_dim = 1.0, 0.0
    arguments = {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "mscale": float(mscale),
        "mscale_all_dim": float(all_dim),
        "yarn_correction_range_round_to_int": truncate is not False,
        **{name: float(rope.pop(key, None) or absent) for key, name, absent in _YARN},
    }
    given, computed = rope.pop("attention_factor", None), _attention_factor(arguments)
    if given is not None and not math.isclose(given, computed, rel_tol=1e-6):
        raise UserError(
            f"config.json: yarn's attention_factor is {shown(given)}; Megatron computes it from the other settings as "
            f"{computed:.6g}."
        )
    return arguments


def _attention_factor(arguments: Mapping[str, Any]) -> float:
    """What YaRN multiplies rotated queries and keys by (its paper's sqrt(1 / t))."""

    def of(scale: float) -> float:
        factor = arguments["rotary_scaling_factor"]
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(arguments["mscale"]) / of(arguments["mscale_all_dim"])


def rope_scaling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: ``rope_scaling``, empty where positions are not scaled."""
    if arguments.get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": arguments["rope_scaling_factor"], **_LLAMA3_CONSTANTS}
    if "yarn" in (arguments.get("position_embedding_type"), arguments.get("rope_type")):
        return _yarn_scaling(arguments)
    if factor := arguments.get("rotary_seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": float(factor)}
    return {}


def _yarn_scaling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn",
        "factor": arguments["rotary_scaling_factor"],
        "original_max_position_embeddings": arguments["yarn_original_max_position_embeddings"],
        **{key: arguments[name] for key, name, _ in _YARN},
    }
    if not arguments["yarn_correction_range_round_to_int"]:
        scaling["truncate"] = False
    if arguments["mscale_all_dim"]:
        scaling |= {key: arguments[key] for key in ("mscale", "mscale_all_dim")}
    return scaling


def _rope_settings(values: Config) -> dict[str, Any]:
    """Rotary settings in transformers 5's spelling, whichever the file has."""
    if values.get("rope_parameters") is None:
        rope = {"rope_theta": values["rope_theta"], **(values.get("rope_scaling") or {})}
    else:
        rope = {"rope_theta": values["rope_theta"], **values["rope_parameters"]}
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"config.json: rotary settings that differ between layers ({', '.join(nested)}).")
    old_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_name or "default"
    part = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if part != 1 and "partial_rotary_factor" not in values:
        raise UserError("config.json: partial_rotary_factor: only whole heads are rotated in this family.")
    if not 0 < part <= 1:
        raise UserError(f"config.json: partial_rotary_factor must lie between 0 and 1, not {shown(part)}.")
    return rope | {"partial_rotary_factor": part}


def _as_whole(value: float) -> int | float:
    """Megatron's flags for these take whole numbers; its code takes any."""
    return int(value) if float(value).is_integer() else float(value)
