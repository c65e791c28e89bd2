"""Other libraries' models in float64, also where they ask for float32: norms, rotary tables, logits, losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """As long as this mode is on, float64 stands wherever torch is asked for float32.

    A model has to be made ``double()`` beside it. What was rounded before, as rotary frequencies are when a model is
    built, stays as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})


class SumsInDouble(TorchFunctionMode):
    """As long as this mode is on, sums of tables over their columns are in float64: of log-probs of answers' tokens."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.sum and args[0].dtype is torch.float32 and args[0].ndim == 2 and kwargs == {"dim": 1}:
            args = (args[0].double(), *args[1:])
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
