"""Calls of torch that would make the host wait for a GPU, counted on a CPU where the emulation stands for one."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: They bring a value to the host, or have a size that only the device knows.
_READ = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(Tensor.__index__, Tensor.nonzero, Tensor.masked_select, torch.nonzero, torch.masked_select, torch.unique),
}  # fmt: skip

#: They make a tensor on the device from values of the host, by a copy from memory that is not pinned.
_MADE = {torch.tensor, torch.as_tensor}


class HostWaits(TorchFunctionMode):
    """Counts them by the line of code that they are on. Everything is taken to be on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._waits(func, args, kwargs):
            caller = next(
                frame for frame in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in frame.filename
            )
            self.places[f"{caller.filename}:{caller.lineno} {caller.line}"] += 1
        return func(*args, **kwargs)

    @staticmethod
    def _waits(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if func in _READ or func is Tensor.new_tensor:
            return True
        if func in _MADE:
            return kwargs.get("device") is not None
        if func is Tensor.cuda:
            return not kwargs.get("non_blocking")
        if func is Tensor.to:
            names_device = any(isinstance(each, str | torch.device) for each in [*args[1:], kwargs.get("device")])
            return names_device and not kwargs.get("non_blocking")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index)
        return func is torch.repeat_interleave and "output_size" not in kwargs
