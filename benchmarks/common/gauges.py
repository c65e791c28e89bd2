"""Time and memory of this process, on a CPU or a GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20


class Instant(NamedTuple):
    """A moment on two clocks, in seconds."""

    wall: float
    processor: float
    """Time that this process has had on a CPU: it hardly depends on who else is busy."""

    @classmethod
    def now(cls) -> Instant:
        """Once the device has done what was asked of it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())


class PeakMemory:
    """Bytes in use at the highest, above those of now: resident memory on a CPU (Linux), PyTorch's on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = float(torch.cuda.memory_allocated())
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
            self.before = _resident("VmRSS")

    def read(self) -> float:
        """The highest so far, once the device has done what was asked of it."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        highest = float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else _resident("VmHWM")
        return highest - self.before


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
