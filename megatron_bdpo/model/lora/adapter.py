"""The adapters of one linear layer: of every projection in it one, side by side as the layer's outputs are.

How the work is split follows the layer, so that no rank holds or moves what is as wide as the hidden states:

    layer     | A        | B        | between A and B           | gradients summed over the layer's ranks
    ----------|----------|----------|---------------------------|-----------------------------------------
    column    | whole    | by rows  | u of all ranks is one     | of u, which makes A's whole
    column SP | whole    | by rows  | u gathered along tokens   | of u (reduce-scatter); of A, by Megatron
    row       | columns  | whole    | u summed                  | none
    row SP    | columns  | whole    | u summed and scattered    | of B and m, by Megatron
    expert    | as above | as above | nothing: Megatron sums    | of what is whole, over its ranks, here
              |          |          | what the experts give     |

u = A x is [tokens, rank]: with SP a thousandth of the hidden states. Megatron sums the gradients of weights that are
marked ``sequence_parallel`` in ``finalize_model_grads``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from megatron_bdpo.model.lora.config import LoraConfig

COLUMN, ROW = 0, 1
"""Which axis of the layer's weight is split: its outputs or its inputs."""


@dataclass(frozen=True)
class Split:
    """How a linear layer is split over ranks."""

    axis: int
    """``COLUMN`` or ``ROW``."""
    group: Any
    """Process group of the split."""
    sequence_parallel: bool = False
    is_expert: bool = False

    @property
    def is_alone(self) -> bool:
        """One rank has the whole layer."""
        return bool(self.group.size() == 1)


@dataclass(frozen=True)
class Outputs:
    """How a layer's outputs are made up of its projections', on this rank."""

    rows: Mapping[str, int]
    """Projection -> its number of outputs, in order."""
    groups: int = 1
    """They alternate: of every projection the first part of so many, of every one the second, ..."""

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """The projections' outputs [..., own] as the layer has them, [..., all]."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-1).flatten(-2)

    def apart(self, rows: Tensor) -> dict[str, Tensor]:
        """Inverse of ``together``, along the first axis."""
        parts = rows.unflatten(0, (self.groups, -1)).split([size // self.groups for size in self.rows.values()], dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(self.rows, parts, strict=True)}


class LoraAdapter(nn.Module):
    """Adapters of those of a layer's projections that are targets.

    Parameters, of each: ``NAME_A`` [rank, in], ``NAME_B`` [out, rank], and for DoRA ``NAME_magnitude`` [out]: what m
    has gained since the start, so that a policy in half precision begins as exactly its reference. m at the start is
    ``parameter.start``, the norms of W's rows in fp32.
    """

    is_on: bool
    """Whether it takes part; without it the layer is the base model's."""

    def __init__(self, config: LoraConfig, weight: Tensor, outputs: Outputs, split: Split) -> None:
        """With A and B zero. Collective over the split's group for DoRA beside a row-parallel layer.

        Args:
            weight: [out, in] of the layer on this rank, with the base model's values.
        """
        super().__init__()
        self.config, self.outputs, self.split = config, outputs, split
        self.names = [name for name in outputs.rows if name in config.targets]
        self.is_on = True
        norms = outputs.apart(self._row_norms(weight)) if config.kind == "dora" else {}
        # Of experts, gradients may be summed over other replicas than of the rest.
        self.all_reduced = getattr(weight, "allreduce", True)
        for name in self.names:
            self._register(f"{name}_A", weight.new_zeros(config.rank, weight.shape[1]), ROW)
            self._register(f"{name}_B", weight.new_zeros(outputs.rows[name], config.rank), COLUMN)
            if config.kind == "dora":
                gained = weight.new_zeros(outputs.rows[name])
                self._register(f"{name}_magnitude", gained, COLUMN).start = norms[name]  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with the adapters'.

        Args:
            hidden: what the layer was given, [T, 1, in], [T/tp, 1, in] or [tokens of the expert, in].
            output: what it gave, bias included, [..., out].
            weight: [out, in], its own.
            bias: [out], which it has added; None: none.
        """
        low = self._between(functional.linear(self._dropped_out(hidden), torch.cat(self._weights("A"))))
        pieces = dict(zip(self.names, low.split(self.config.rank, dim=-1), strict=True))
        up = dict(zip(self.names, self._weights("B"), strict=True))
        added = self.config.factor * self.outputs.together(
            [
                functional.linear(pieces[name], up[name]) if name in up else output.new_zeros(*output.shape[:-1], rows)
                for name, rows in self.outputs.rows.items()
            ]
        )
        if self.config.kind == "lora":
            return output + added
        with torch.no_grad():
            norms = self._adapted_norms(weight)
        beyond_one = self._scales(norms) - 1
        base = output if bias is None else output - bias
        return output + added + (beyond_one * (base + added)).to(output.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the adapters in it, in fp32. Collective for DoRA beside a row-parallel layer."""
        whole = weight.float()
        products = [
            self._parameter(name, "B").float() @ self._parameter(name, "A").float()
            if name in self.names
            else whole.new_zeros(rows, whole.shape[1])
            for name, rows in self.outputs.rows.items()
        ]
        moved = whole + self.config.factor * self.outputs.together([each.t() for each in products]).t()
        if self.config.kind == "lora":
            return moved
        return moved * self._scales(self.outputs.apart(self._row_norms(moved)))[:, None]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As Megatron's layers have it."""
        axes = {
            name: weight.partition_dim  # type: ignore[attr-defined]
            for name, weight in self.named_parameters()
            if weight.tensor_model_parallel  # type: ignore[attr-defined]
        }
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.split.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state

    # Work on this rank's part ----------------------------------------------------------------------------------------

    def _dropped_out(self, hidden: Tensor) -> Tensor:
        probability = self.config.dropout
        if not (self.training and probability):
            return hidden
        if self.split.is_alone or (self.split.axis == COLUMN and not self.split.sequence_parallel):
            return functional.dropout(hidden, probability)  # the same on all ranks, as the input is
        with get_cuda_rng_tracker().fork():
            return functional.dropout(hidden, probability)

    def _between(self, low: Tensor) -> Tensor:
        """From A's outputs on this rank to B's inputs; see the table above."""
        split = self.split
        if split.is_alone or split.is_expert:
            return low
        if split.axis == COLUMN:
            if split.sequence_parallel:
                gathered: Tensor = gather_from_sequence_parallel_region(low, group=split.group)
                return gathered
            copied: Tensor = copy_to_tensor_model_parallel_region(low, group=split.group)
            return copied
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if split.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        reduced: Tensor = reduce(low, group=split.group)
        return reduced

    def _weights(self, kind: str) -> list[Tensor]:
        return [self._summed_in_backward(self._parameter(name, kind)) for name in self.names]

    def _summed_in_backward(self, weight: nn.Parameter) -> Tensor:
        """A weight that every rank of a split expert has whole, and of whose gradient each rank gets a part."""
        if self.split.is_alone or not self.split.is_expert or weight.tensor_model_parallel:  # type: ignore[attr-defined]
            return weight
        copied: Tensor = copy_to_tensor_model_parallel_region(weight, group=self.split.group)
        return copied

    # DoRA ------------------------------------------------------------------------------------------------------------

    def _scales(self, norms: Mapping[str, Tensor]) -> Tensor:
        """[out] m / |W + factor B A|, in fp32, of the norms by projection. One where a projection has no adapter."""
        scales = [
            self._magnitude(name) / norms[name]
            if name in self.names
            else torch.ones(rows, device=norms[self.names[0]].device)
            for name, rows in self.outputs.rows.items()
        ]
        return self.outputs.together(scales)

    def _magnitude(self, name: str) -> Tensor:
        gained = self._parameter(name, "magnitude")
        start: Tensor = gained.start  # type: ignore[attr-defined]
        return start.to(gained.device) + self._summed_in_backward(gained).float()

    def _adapted_norms(self, weight: Tensor) -> dict[str, Tensor]:
        """|W + factor B A| by rows, without making B A, which is as large as W.

        The square is |W|^2 + 2 factor (W A^T) . B + factor^2 (B A A^T) . B, with a dot for the sum over a row.
        """
        factor, found = self.config.factor, {}
        with_low = self.outputs.apart(
            functional.linear(weight, torch.cat([self._parameter(name, "A") for name in self.names])).float()
        )
        for place, name in enumerate(self.names):
            low, up = self._parameter(name, "A").float(), self._parameter(name, "B").float()
            own = slice(place * self.config.rank, (place + 1) * self.config.rank)
            crossed = (with_low[name][:, own] * up).sum(1)
            squares = ((up @ (low @ low.t())) * up).sum(1)
            found[name] = self._summed_over_inputs(2 * factor * crossed + factor**2 * squares)
        starts = {name: self._parameter(name, "magnitude").start.to(weight.device) for name in found}  # type: ignore[attr-defined]
        # Where B is zero, this is the norm itself to the last bit.
        return {name: starts[name] * (1 + moved / starts[name].square()).sqrt() for name, moved in found.items()}

    def _row_norms(self, weight: Tensor) -> Tensor:
        """[out] in fp32, of whole rows."""
        with torch.no_grad():
            return self._summed_over_inputs(weight.float().square().sum(1)).sqrt()

    def _summed_over_inputs(self, values: Tensor) -> Tensor:
        if self.split.axis == ROW and not self.split.is_alone:
            torch.distributed.all_reduce(values, group=self.split.group)
        return values

    # Parameters ------------------------------------------------------------------------------------------------------

    def _parameter(self, name: str, kind: str) -> nn.Parameter:
        found = self.get_parameter(f"{name}_{kind}")
        return found

    def _register(self, name: str, value: Tensor, split_axis: int) -> nn.Parameter:
        """A parameter that is split with the layer if the layer is split along ``split_axis``."""
        parameter = nn.Parameter(value)
        is_split = self.split.axis == split_axis
        # The axis of A's inputs is its second one, that of B's and m's outputs their first.
        set_tensor_model_parallel_attributes(parameter, is_split, split_axis if is_split else -1, 1)
        shared = {"sequence_parallel": self.split.sequence_parallel and not is_split}
        for key, attribute in {**shared, "allreduce": self.all_reduced}.items():
            setattr(parameter, key, attribute)
        self.register_parameter(name, parameter)
        return parameter
