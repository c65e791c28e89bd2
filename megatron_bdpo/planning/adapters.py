"""Low-rank adapters beside a model's linear layers: what a rank holds, computes, keeps and moves for them.

Of a projection with ``in`` inputs and ``out`` outputs; exact numbers:

| beside a layer that is             | A        | B          | DoRA's m |
|------------------------------------|----------|------------|----------|
| column-parallel: q, k, v; gate, up | r in     | out r / tp | out / tp |
| row-parallel: o; down              | r in / tp| out r      | out      |

Experts have their own, over the tensor-parallel ranks of an expert. The base has neither gradients nor optimizer.

What autograd keeps of a linear layer with s positions on a rank, e bytes an element; n projections have adapters:

| kept                                  | bytes                                                                     |
|---------------------------------------|---------------------------------------------------------------------------|
| its input                             | for A, as it was for the weight's gradient; where n is 0, it is not kept  |
| u = A x of its n projections          | s n r e, beside row-parallel layers / sp                                  |
| their A, side by side                 | n r in e, / tp beside row-parallel layers                                 |
| DoRA: outputs that are scaled         | s out e, / tp or / sp, of all of the layer's projections                  |
| dropout: which inputs are left out    | s in, / sp or / tp                                                        |

Symbols: r rank of the adapters, tp ranks of the layer's split, sp: tp under sequence parallelism, else 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_bdpo.planning.model import ModelShape, Parameters, Split

#: As ``model.lora.lora_config`` has them.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What of adapters memory and time depend on."""

    rank: int
    targets: tuple[str, ...] = PROJECTIONS
    """Projections that have one."""
    dora: bool = False
    dropout: bool = False
    """Of their inputs."""

    def __str__(self) -> str:
        where = "" if self._are_everywhere() else f" beside {', '.join(self.targets)}"
        return f"{'DoRA' if self.dora else 'LoRA'} of rank {self.rank}{where}"

    def flags(self) -> str:
        """That ask for them, but for what makes no difference here."""
        targets = "" if self._are_everywhere() else f" --lora-targets {','.join(self.targets)}"
        return f"--lora-rank {self.rank}{targets}{' --lora-type dora' if self.dora else ''}"

    def _are_everywhere(self) -> bool:
        return set(self.targets) == set(PROJECTIONS)


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model, whole."""

    inputs: int
    outputs: Mapping[str, int]
    """By projection."""
    is_row: bool = False
    """Split by its inputs, and not by its outputs."""

    def adapted(self, adapters: Adapters) -> dict[str, int]:
        """Those of ``outputs`` whose projection has an adapter."""
        return {name: size for name, size in self.outputs.items() if name in adapters.targets}

    def split_and_whole(self, adapters: Adapters) -> tuple[int, int]:
        """Parameters of its adapters that the layer's ranks divide, and those that each of them has."""
        outputs = self.adapted(adapters)
        low = len(outputs) * adapters.rank * self.inputs
        high = sum(outputs.values()) * (adapters.rank + adapters.dora)
        return (low, high) if self.is_row else (high, low)

    def parameters(self, adapters: Adapters, ranks: int) -> int:
        """Of its adapters on one of the ranks that the layer is split over."""
        split, whole = self.split_and_whole(adapters)
        return split // ranks + whole

    def operations(self, adapters: Adapters, positions: float, ranks: int, *, sequence_parallel: bool) -> float:
        """Of its adapters' forward pass on a rank, which has ``positions`` of the layer's wider side."""
        outputs = self.adapted(adapters)
        split, whole = self.split_and_whole(adapters)
        magnitudes = adapters.dora * sum(outputs.values())
        split, whole = (split, whole - magnitudes) if self.is_row else (split - magnitudes, whole)
        return 2 * positions * (split / ranks + whole / (ranks if sequence_parallel else 1))

    def kept(
        self, adapters: Adapters, positions: float, size: int, ranks: int, narrow: float, *, copies: float = 1.0
    ) -> float:
        """Bytes that its adapters keep on a rank, beside the layer's input.

        Args:
            positions: that this rank multiplies with its part of the layer.
            size: bytes of an element.
            ranks: that the layer is split over.
            narrow: what the side that is not split is divided by: the ranks under sequence parallelism.
            copies: layers of this shape that share the positions: experts.
        """
        adapted = self.adapted(adapters)
        if not adapted:
            return 0.0
        low = positions * len(adapted) * adapters.rank / (narrow if self.is_row else 1)
        weights = copies * len(adapted) * adapters.rank * self.inputs / (ranks if self.is_row else 1)
        scaled = adapters.dora * positions * sum(self.outputs.values()) / (narrow if self.is_row else ranks)
        left_out = adapters.dropout * positions * self.inputs / (ranks if self.is_row else narrow)
        return (low + weights + scaled) * size + left_out


def attention_linears(model: ModelShape) -> tuple[Linear, Linear]:
    """Query, key and value; the projection behind attention."""
    queries, keys = model.heads * model.head, model.groups * model.head
    return (
        Linear(model.hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
        Linear(queries, {"o_proj": model.hidden}, is_row=True),
    )


def mlp_linears(model: ModelShape, ffn: int) -> tuple[Linear, Linear]:
    """Gate and up; down."""
    into = {"gate_proj": ffn, "up_proj": ffn} if model.gated else {"up_proj": ffn}
    return Linear(model.hidden, into), Linear(ffn, {"down_proj": model.hidden}, is_row=True)


def dense_mlp_linears(model: ModelShape, *, has_experts: bool) -> tuple[Linear, ...]:
    """Gate and up, and down, of one layer's MLP, or of the shared expert that it has beside experts."""
    ffn = model.shared_expert_ffn if has_experts else model.ffn
    return mlp_linears(model, ffn) if ffn else ()


def adapter_parameters(model: ModelShape, split: Split, adapters: Adapters, stage: int) -> Parameters:
    """What each rank of a pipeline stage holds of adapters."""
    numbers = [layer for chunk in split.stage_layers(model.layers, stage) for layer in chunk]
    kinds = [model.has_experts(layer) for layer in numbers]
    dense = {
        kind: sum(
            each.parameters(adapters, split.layout.tensor)
            for each in (*attention_linears(model), *dense_mlp_linears(model, has_experts=kind))
        )
        for kind in set(kinds)
    }
    return Parameters(
        embedding=0,
        layers=sum(dense[kind] for kind in kinds),
        experts=sum(kinds) * _expert_parameters(model, split, adapters),
        output=0,
    )


def _expert_parameters(model: ModelShape, split: Split, adapters: Adapters) -> int:
    own, ranks = model.experts // split.layout.expert, split.expert_tensor_size()
    return own * sum(each.parameters(adapters, ranks) for each in mlp_linears(model, model.expert_ffn))
