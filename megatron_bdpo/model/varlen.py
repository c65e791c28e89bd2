"""Torch's varlen flash attention, as whatever release is installed has it.

It came with torch 2.10 and its parameters have changed since (all are in ``tests/unit/model/torch_releases.json``):

    2.10        is_causal
    2.11        scale, window_size
    2.12 to 15  scale, window_size, enable_gqa

So what it takes is asked of the function itself: builds between releases, NVIDIA's containers for one, have either. In
all of them the causal mask is bottom-right: the kernel is FlashAttention 2.1 or newer, and torch's own
``attention.bias.causal_lower_right`` calls it for that. In all of them, too, several query heads can share a key head,
and the kernel adds their gradients up: before 2.12 the function in front of it checks nothing, since then it asks for
the flag.

None of them has a parameter for a cap or for sinks, and the kernel's values are as wide as its keys: narrower ones are
filled up with zeros, which leaves results and gradients as they are.

Shapes: Q queries and K keys of all runs, n query heads, g key/value heads, d head size, e <= d that of values.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_bdpo.model.attention_layer import Layer


@dataclass(frozen=True)
class Varlen:
    """A release's ``varlen_attn``, and the names of its parameters."""

    function: Callable[..., Any]
    takes: frozenset[str]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Varlen | None:
        """None where it can have no causal mask."""
        takes = frozenset(inspect.signature(function).parameters)
        return cls(function, takes) if takes & {"window_size", "is_causal"} else None

    def cannot(self, layer: Layer) -> str:
        """Why it cannot attend so, said of it; "" if it can."""
        head_size = layer.head_size
        if head_size % 8 or head_size > 256:
            return f"takes head sizes of 8, 16, ... 256, not {head_size}"
        if layer.output_size > head_size:
            return f"takes values no wider than keys ({head_size}), not {layer.output_size}"
        if layer.softcap is not None:
            return "does not cap scores"
        if layer.sinks:
            return "has no sinks"
        if layer.window is not None and "window_size" not in self.takes:
            return "has no windows (2.11's has)"
        if "scale" not in self.takes and _power_of_two(layer.scale * math.sqrt(head_size)) is None:
            return "scales scores by 1 / sqrt(head size) only (2.11's by any number)"
        return ""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        layer: Layer,
    ) -> Tensor:
        """[Q, n, d], [K, g, d], [K, g, e] -> [Q, n, e], in one kernel for all runs.

        Args:
            starts: [R + 1] int32 each, where the queries and the keys of each of R runs begin.
            longest: of the runs, in queries and in keys.
        """
        more: dict[str, Any] = {}
        longest_query, longest_key = longest
        if "window_size" in self.takes:
            more["window_size"] = (-1 if layer.window is None else layer.window, 0)
        else:
            more["is_causal"] = True
            # At 1 the kernel takes a shortcut for inference, which orders the log-sum-exps of grouped heads otherwise
            # than its backward pass reads them. It is a bound: runs may be shorter.
            longest_query = max(longest_query, 2)
        if "scale" in self.takes:
            more["scale"] = layer.scale
        else:
            query = _times_power_of_two(query, layer.scale * math.sqrt(query.shape[2]))
        if "enable_gqa" in self.takes:
            more["enable_gqa"] = query.shape[1] != key.shape[1]
        missing = query.shape[2] - value.shape[2]
        filled = functional.pad(value, (0, missing)) if missing else value
        out: Tensor = self.function(query, key, filled, *starts, longest_query, longest_key, **more)
        return out[..., : value.shape[2]] if missing else out


@functools.cache
def installed() -> Varlen | None:
    """Of the installed torch; None before 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return Varlen.of(varlen_attn)


def why_not(layer: Layer) -> str:
    """Why the installed torch's varlen attention cannot attend so, as a clause; "" if it can."""
    varlen = installed()
    if varlen is None:
        return f"torch {torch.__version__} has no varlen attention (2.11 has)"
    reason = varlen.cannot(layer)
    return reason and f"the varlen attention of torch {torch.__version__} {reason}"


def _power_of_two(factor: float) -> int | None:
    """The exponent, if the factor is a power of two but for the rounding of a square root."""
    if factor <= 0:
        return None
    exponent = round(math.log2(factor))
    return exponent if math.isclose(factor, 2.0**exponent, rel_tol=1e-6) else None


def _times_power_of_two(query: Tensor, factor: float) -> Tensor:
    """Exact in every floating-point type, as no mantissa changes. That it is one, ``cannot`` has made sure."""
    exponent = _power_of_two(factor)
    if exponent is None:
        raise ValueError(f"{factor} is no power of two: scaling the queries by it would round them")
    return query * 2.0**exponent if exponent else query
