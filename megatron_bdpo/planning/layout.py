"""Parallel layouts: which of them a model can be divided by, and which of those is near another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; data parallelism takes the ranks that are left."""

    tensor: int
    pipeline: int
    context: int
    expert: int = 1

    def __str__(self) -> str:
        flags = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--context-parallel-size": self.context,
            "--expert-model-parallel-size": self.expert,
        }
        return " ".join(f"{flag} {size}" for flag, size in flags.items() if size > 1) or "data parallelism alone"

    def distance(self, other: Layout) -> float:
        """Doublings between two layouts. Memory depends on them, so more splitting is nearer than less."""
        pairs = zip(self.sizes(), other.sizes(), strict=True)
        return sum(math.log2(mine / theirs) * (1 if mine > theirs else -1.1) for mine, theirs in pairs)

    def sizes(self) -> tuple[int, ...]:
        """Tensor, pipeline, context, expert."""
        return self.tensor, self.pipeline, self.context, self.expert


@dataclass(frozen=True)
class Divisible:
    """What of a model and its job the layout has to divide. 0 where a part is not there or is not ours to check."""

    ranks: int
    layers: int
    layers_per_chunk: int
    heads: int
    groups: int
    ffn: int
    experts: int
    expert_ffn: int
    expert_tensor: int
    shares_groups: bool = True
    """Tensor-parallel ranks may share a query group; beside adapters they may not."""

    def problems(self, layout: Layout) -> Iterator[str]:
        """Reasons why the layout cannot work."""
        tp, pp, cp, ep = layout.sizes()
        if self.ranks % (tp * pp * cp):
            yield f"{self.ranks} ranks cannot be split into model replicas of {tp * pp * cp} ({tp} x {pp} x {cp})"
        yield from self._tensor_problems(tp)
        yield from self._pipeline_problems(pp)
        if self.experts:
            yield from self._expert_problems(tp, pp, ep)
        elif ep > 1:
            yield "--expert-model-parallel-size is for models with --num-experts"

    def _tensor_problems(self, tensor: int) -> Iterator[str]:
        if self.heads % tensor:
            yield f"{self.heads} attention heads cannot be split over {tensor} tensor-parallel ranks"
        elif self.groups % tensor and not self.shares_groups:
            yield f"{self.groups} query groups cannot be split over {tensor} tensor-parallel ranks, as adapters need it"
        elif self.groups % tensor and tensor % self.groups:
            yield f"{self.groups} query groups can neither be split over nor shared by {tensor} tensor-parallel ranks"
        if self.ffn % tensor:
            yield f"an MLP of {self.ffn} cannot be split over {tensor} tensor-parallel ranks"

    def tensor_sizes(self) -> list[int]:
        """Sizes of tensor parallelism that divide heads and MLP, whatever the number of ranks; without 1."""
        return [size for size in range(2, self.heads + 1) if not any(True for _ in self._tensor_problems(size))]

    def _pipeline_problems(self, stages: int) -> Iterator[str]:
        if self.layers % stages:
            yield (
                f"{self.layers} layers cannot be split evenly over {stages} pipeline stages "
                "(uneven ones: --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers)"
            )
        elif self.layers_per_chunk and (self.layers // stages) % self.layers_per_chunk:
            yield f"{self.layers // stages} layers of a stage cannot be split into chunks of {self.layers_per_chunk}"
        if self.layers_per_chunk and stages == 1:
            yield "virtual pipeline stages need more than one pipeline stage"

    def _expert_problems(self, tensor: int, stages: int, expert: int) -> Iterator[str]:
        expert_tensor = self.expert_tensor or tensor
        if self.experts % expert:
            yield f"{self.experts} experts cannot be split over {expert} expert-parallel ranks"
        if self.ranks % (expert_tensor * expert * stages):
            yield (
                f"{self.ranks} ranks cannot be split into groups of {expert_tensor * expert * stages} for the experts "
                f"({expert_tensor} expert-tensor-parallel x {expert} expert-parallel x {stages} stages)"
            )
        if self.expert_ffn % expert_tensor:
            yield f"experts of {self.expert_ffn} cannot be split over {expert_tensor} tensor-parallel ranks"

    def nearest(self, wanted: Layout) -> Layout | None:
        """The layout that works and is the fewest doublings away."""
        sizes = [size for size in range(1, self.ranks + 1) if self.ranks % size == 0]
        candidates = (Layout(*each) for each in itertools.product(sizes, sizes, sizes, sizes if self.experts else [1]))
        return min(
            (layout for layout in candidates if not any(True for _ in self.problems(layout))),
            key=lambda layout: (layout.distance(wanted), layout.sizes()),
            default=None,
        )
