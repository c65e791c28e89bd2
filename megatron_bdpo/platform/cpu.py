"""Run Megatron's own trainer on CPU ranks with gloo, when there is no GPU.

Megatron names the device 'cuda' in its schedules, buffers, optimizers and timers. Rather than fork them, we let
PyTorch answer those calls with the CPU. That is how every parallel layout is tested on a laptop, with Megatron's
real schedules and collectives. It is never active when a GPU is usable.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

_active: TorchFunctionMode | None = None

_MEMORY_STATS = (
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "reserved_bytes.all.current",
    "reserved_bytes.all.peak",
    "allocated_bytes.all.allocated",
    "allocation.all.current",
)


def is_active() -> bool:
    """Whether the emulation is in force in this process."""
    return _active is not None


def emulate_cuda_on_cpu() -> None:
    """Install the emulation for the life of this process. Idempotent.

    Call before anything of Megatron is imported: some modules bind ``torch.cuda`` functions at import.

    Raises:
        RuntimeError: if a GPU is usable; the emulation must never hide one.
    """
    global _active
    if _active is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU emulation must not be installed where a GPU is usable")
    _leave_out_gpu_packages()
    _patch_torch_cuda()
    _megatron().patch(checkpoint_writer=_write_checkpoints)
    # Megatron warms up torch.compile'd functions at start. On a CPU that takes a C++ compiler and minutes, and our
    # defaults use none of them.
    torch._dynamo.config.disable = True
    _active = _CudaNamesCpu()
    _active.__enter__()  # stays: the mode lasts as long as the process


def _megatron() -> Any:
    """What is replaced in Megatron: importing it has Megatron bind the functions of torch.cuda that there are."""
    from megatron_bdpo.platform import megatron_on_cpu

    return megatron_on_cpu


def _leave_out_gpu_packages() -> None:
    """Importing them says that they are not installed, to Megatron and to us, which both then do without.

    They compute on GPUs only, and Transformer Engine may not even load without the CUDA libraries. A cluster's login
    node has the environment of its GPU nodes, and there a job is checked, planned or converted.
    """
    for name in ("transformer_engine", "apex"):
        sys.modules[name] = None  # type: ignore[assignment]  # how Python marks what cannot be imported


def _to_cpu(device: Any) -> Any:
    """The CPU for everything that names a CUDA device; anything else unchanged."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    is_name = isinstance(device, str) and device.startswith("cuda")
    is_cuda = isinstance(device, torch.device) and device.type == "cuda"
    return torch.device("cpu") if is_index or is_name or is_cuda else device


class _CudaNamesCpu(TorchFunctionMode):
    """Rewrites CUDA devices in every torch call of this thread to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DDP buckets and clip_grad compare with 'torch.cuda.FloatTensor' by name.
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to:
            args = tuple(_to_cpu(arg) if isinstance(arg, str | torch.device) else arg for arg in args)
        return func(*args, **kwargs)


class _Stream:
    """A stream on which nothing waits: CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def record_event(self, event: _Event | None = None) -> _Event:
        return _Event() if event is None else event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _Event(_Stream):
    def elapsed_time(self, other: object) -> float:
        return 0.0

    def query(self) -> bool:
        return True


def _patch_torch_cuda() -> None:
    cpu = torch.device("cpu")
    properties = types.SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)
    replacements: dict[str, Any] = {
        # Device queries: allocations with device=torch.cuda.current_device() land on the CPU, and
        # initialize_megatron sets up model parallelism only when it counts a device.
        "current_device": lambda: cpu,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_properties": lambda *args, **kwargs: properties,
        "get_device_capability": lambda *args, **kwargs: (9, 0),
        # Nothing is asynchronous on the CPU: streams, events and synchronisation are no-ops.
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "synchronize": lambda *args, **kwargs: None,
        # One generator: what Megatron saves and restores as the CUDA state is the CPU's.
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        # The memory report after the first step indexes these keys.
        "memory_stats": lambda *args, **kwargs: dict.fromkeys(_MEMORY_STATS, 0),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.nn.Module.cuda = lambda self, *args: self  # type: ignore[method-assign]


def _write_checkpoints(*args: Any) -> None:
    """The process that writes for --async-save: it counts devices, and starts without the emulation."""
    emulate_cuda_on_cpu()
    _megatron().write_checkpoints(*args)
