"""The adapters of one linear layer: of every projection in it one, side by side as the layer's outputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.model.lora.split import COLUMN, ROW, Split


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
        if self.training and self.config.dropout:
            hidden = self.split.drop_out(hidden, self.config.dropout)
        low = self.config.factor * self.split.between(functional.linear(hidden, torch.cat(self._weights("A"))))
        pieces = dict(zip(self.names, low.split(self.config.rank, dim=-1), strict=True))
        up = dict(zip(self.names, self._weights("B"), strict=True))
        added = self.outputs.together(
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
        made = zip(self.names, self._weights("A"), self._weights("B"), strict=True)
        products = {name: up.float() @ low.float() for name, low, up in made}
        zeros = {name: whole.new_zeros(rows, whole.shape[1]) for name, rows in self.outputs.rows.items()}
        parts = [each.t() for each in (zeros | products).values()]
        moved = whole + self.config.factor * self.outputs.together(parts).t()
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

    def _weights(self, kind: str) -> list[Tensor]:
        """``NAME_A``, ``NAME_B`` or ``NAME_magnitude`` of all projections with adapters, for a forward pass."""
        return [self.split.summed_in_backward(self.get_parameter(f"{name}_{kind}")) for name in self.names]

    # DoRA ------------------------------------------------------------------------------------------------------------

    def _scales(self, norms: Mapping[str, Tensor]) -> Tensor:
        """[out] m / |W + factor B A|, in fp32, of the norms by projection. One where a projection has no adapter."""
        starts = self._starts()
        device = next(iter(starts.values())).device
        scales = {name: torch.ones(rows, device=device) for name, rows in self.outputs.rows.items()}
        for name, gained in zip(self.names, self._weights("magnitude"), strict=True):
            scales[name] = (starts[name] + gained.float()) / norms[name]
        return self.outputs.together(list(scales.values()))

    def _starts(self) -> dict[str, Tensor]:
        """By projection: [out] m at the start."""
        gained = {name: self.get_parameter(f"{name}_magnitude") for name in self.names}
        return {name: weight.start.to(weight.device) for name, weight in gained.items()}  # type: ignore[attr-defined]

    def _adapted_norms(self, weight: Tensor) -> dict[str, Tensor]:
        """|W + factor B A| by rows, without making B A, which is as large as W.

        The square is |W|^2 + 2 factor (W A^T) . B + factor^2 (B A A^T) . B, with a dot for the sum over a row.
        """
        factor, rank, found, starts = self.config.factor, self.config.rank, {}, self._starts()
        with_low = self.outputs.apart(functional.linear(weight, torch.cat(self._weights("A"))).float())
        adapters = zip(self.names, self._weights("A"), self._weights("B"), strict=True)
        for place, (name, low, up) in enumerate(adapters):
            low, up = low.float(), up.float()
            crossed = (with_low[name][:, place * rank : (place + 1) * rank] * up).sum(1)
            squares = ((up @ (low @ low.t())) * up).sum(1)
            moved = self.split.sum_over_inputs(2 * factor * crossed + factor**2 * squares)
            # Where B is zero, this is the norm itself to the last bit.
            found[name] = starts[name] * (1 + moved / starts[name].square()).sqrt()
        return found

    def _row_norms(self, weight: Tensor) -> Tensor:
        """[out] in fp32, of whole rows."""
        with torch.no_grad():
            return self.split.sum_over_inputs(weight.float().square().sum(1)).sqrt()

    # Parameters ------------------------------------------------------------------------------------------------------

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
