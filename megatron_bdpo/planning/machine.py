"""A cluster of GPUs as the arithmetic sees it: a few rates, from data sheets, and the assumed shares of them.

The rates are those of H100 SXM with an NVLink switch in each node and one InfiniBand port of 400 Gb/s for each GPU. The
shares are assumptions; no run has confirmed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: FLOP/s of dense matrix products, NVIDIA's data sheet of the H100 SXM. fp32: CUDA cores, Megatron switches TF32 off.
H100_PEAKS = {"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12, "fp32": 67e12}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a GPU computes and moves in a second."""

    gpus_per_node: int = 8
    peaks: Mapping[str, float] = field(default_factory=lambda: H100_PEAKS)
    """FLOP/s by precision."""
    attainable: float = 0.6
    """Assumed, of the peak: what a layer's products reach with the element-wise work between them counted in."""
    nvlink: float = 450e9
    """Bytes/s in one direction, by the data sheet (900 GB/s in both)."""
    nvlink_share: float = 0.75
    """Assumed: what NCCL's collectives reach of it."""
    infiniband: float = 50e9
    """Bytes/s of a GPU's port in one direction: 400 Gb/s."""
    infiniband_share: float = 0.85
    """Assumed."""
    latency: float = 20e-6
    """Assumed, seconds: what a collective costs whatever its size."""
    memory: float = 3.35e12
    """Bytes/s of HBM3, by the data sheet."""
    memory_share: float = 0.8
    """Assumed."""

    def rate(self, precision: str) -> float:
        """FLOP/s that products reach."""
        return self.peaks[precision] * self.attainable

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s into and out of each rank of a group: ``size`` ranks, ``stride`` apart.

        Within a node that is NVLink. Over nodes a ring has as many ports as the group has ranks in a node; each of the
        node's other groups has its own.
        """
        nvlink = self.nvlink * self.nvlink_share
        if stride * size <= self.gpus_per_node:
            return nvlink
        ports = min(size, max(1, self.gpus_per_node // stride))
        return min(nvlink, ports * self.infiniband * self.infiniband_share)

    def collective(self, whole: float, stride: int, size: int) -> float:
        """Seconds of an all-gather to, or a reduce-scatter of, ``whole`` bytes on each rank; also of an all-to-all."""
        if size == 1 or not whole:
            return 0.0
        return whole * (size - 1) / size / self.bandwidth(stride, size) + self.latency

    def send(self, size: float, distance: int, stages: int) -> float:
        """Seconds from one pipeline stage to the next, ``distance`` ranks away."""
        inside = distance * stages <= self.gpus_per_node
        rate = self.nvlink * self.nvlink_share if inside else self.infiniband * self.infiniband_share
        return size / rate + self.latency
