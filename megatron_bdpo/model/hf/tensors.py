"""How Megatron's weights are made of Hugging Face's: as rows, so that one description serves both directions.

Every tensor of Megatron is a sequence of row ranges of Hugging Face tensors: renamed (one range), stacked (gate and
up projection), or interleaved by group (queries, key and value of each group of heads). Columns are the same in both.
Reading a shard is cutting its rows out of that sequence; exporting is putting each range back.

Nothing here depends on the layer implementation: the names are those of Megatron's checkpoints, which are the same
for local and Transformer Engine layers but for the norm in front of experts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` of a Hugging Face tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are made of."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    """Groups of query heads that share a key and a value."""
    head: int
    vocab: int
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Of the expert that every token has."""
    one: int = 1
    query_latent: int = 0
    latent: int = 0
    """Of keys and values, in multi-latent attention."""
    plain_part: int = 0
    rotated_part: int = 0
    """Of a head of queries and keys there."""
    value: int = 0
    """Of a head of values there."""
    rank: int = 0
    """Of adapters."""
    sparse: tuple[bool, ...] = ()
    """Of each layer, whether it has experts; empty where all are alike."""

    @property
    def queries(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head

    @property
    def values(self) -> int:
        """Columns of the output projection of multi-latent attention."""
        return self.heads * self.value

    @property
    def latent_and_rotated(self) -> int:
        """Rows of the projection to the latent of keys and values, and to what is rotated of keys."""
        return self.latent + self.rotated_part

    @property
    def keys_and_values(self) -> int:
        """Rows of the projection from the latent."""
        return self.heads * (self.plain_part + self.value)

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.groups * self.head


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor. Sizes are attributes of :class:`Dimensions`."""

    rows: Mapping[str, str | tuple[str, ...]]
    """Hugging Face name, which may contain {layer} and {expert} -> its number of rows, in order; or those of the parts
    that are stacked in it."""
    columns: str | None = None
    """None for vectors."""
    interleaved_by: str | None = None
    """Cut every tensor, or every part, in so many pieces; first come all first pieces, then all second ones, ..."""
    layers: str | None = None
    """Of a model some of whose layers have experts: ``"sparse"`` for what those have, ``"dense"`` for what the others
    have."""

    def parts(self, sizes: Dimensions, names: Mapping[str, int]) -> list[Rows]:
        """The Megatron tensor from its first row to its last; ``names`` gives the layer and the expert."""
        blocks = getattr(sizes, self.interleaved_by) if self.interleaved_by else 1
        found = []
        for block in range(blocks):
            for pattern, stacked in self.rows.items():
                first = 0
                for whole in _lengths(stacked, sizes):
                    length = whole // blocks
                    start = first + block * length
                    found.append(Rows(pattern.format(**names), start, start + length))
                    first += whole
        return found

    def shapes(self, sizes: Dimensions, names: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The Hugging Face tensors that the Megatron tensor is made of."""
        columns = (getattr(sizes, self.columns),) if self.columns else ()
        return {
            pattern.format(**names): (sum(_lengths(stacked, sizes)), *columns) for pattern, stacked in self.rows.items()
        }


def _lengths(stacked: str | tuple[str, ...], sizes: Dimensions) -> list[int]:
    """Rows of each part of a Hugging Face tensor."""
    return [getattr(sizes, size) for size in ((stacked,) if isinstance(stacked, str) else stacked)]


class Place(NamedTuple):
    """A Megatron tensor of one layer (and expert): its name without numbers, and these."""

    key: str
    indices: tuple[int, ...] = ()
    """(layer, expert), (layer,), or () outside of layers."""


_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def place_of(key: str, leading: tuple[int, ...]) -> Place:
    """Where a checkpoint tensor belongs. Megatron stacks layers and experts, or numbers them in the name.

    Args:
        key: as in a checkpoint.
        leading: the offsets along the stacked axes.
    """
    return Place(_NUMBER.sub("", key), (*(int(number) for number in _NUMBER.findall(key)), *leading))


@dataclass(frozen=True)
class WeightMap:
    """All tensors of one model."""

    rules: Mapping[str, Rule]
    """By Megatron's name without numbers. Two names may say the same: those of different layer implementations."""
    sizes: Dimensions

    def parts(self, place: Place) -> list[Rows]:
        """What a Megatron tensor is made of, from its first row to its last."""
        return self.rules[place.key].parts(self.sizes, _names(place.indices))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor of the model."""
        found: dict[str, tuple[int, ...]] = {}
        for key, rule in self.rules.items():
            for indices in self._indices(key, rule):
                found |= rule.shapes(self.sizes, _names(indices))
        return found

    def matrix_axes(self, key: str) -> int:
        """Axes of the Megatron tensor of one layer and expert."""
        return 1 if self.rules[key].columns is None else 2

    def _indices(self, key: str, rule: Rule) -> Iterator[tuple[int, ...]]:
        axes: list[Sequence[int]] = []
        if any("{layer}" in name for name in rule.rows):
            axes.append([layer for layer in range(self.sizes.layers) if self._has(layer, rule)])
        if any("{expert}" in name for name in rule.rows):
            axes.append(range(self.sizes.experts))
        return itertools.product(*axes)

    def _has(self, layer: int, rule: Rule) -> bool:
        if rule.layers is None:
            return True
        sparse = self.sizes.sparse[layer] if self.sizes.sparse else self.sizes.experts > 0
        return sparse == (rule.layers == "sparse")


def _names(indices: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("layer", "expert"), indices, strict=False))
