"""What adapters a model has: the numbers of PEFT's ``LoraConfig``, and which projections they stand beside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from megatron_bdpo.errors import UserError

#: Megatron's linear layers -> the projections whose outputs they hold side by side, in order. Names are Llama's.
LINEARS: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
PROJECTIONS = tuple(name for names in LINEARS.values() for name in names)

#: Words for several projections.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": PROJECTIONS,
}

#: Other families' names: Mixtral's experts.
OTHER_NAMES: Mapping[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

Kind = Literal["lora", "dora"]
Scaling = Literal["rank", "sqrt-rank"]
KINDS: tuple[str, ...] = get_args(Kind)
SCALINGS: tuple[str, ...] = get_args(Scaling)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of one model.

    LoRA (arXiv 2106.09685) adds ``factor * B A x`` to a projection's ``W x``; A [rank, in], B [out, rank]. DoRA (arXiv
    2402.09353, equation 5) then scales each output by m / |W + factor B A|, the norm of its row, which counts as a
    constant for gradients (section 4.3).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS
    """Of ``PROJECTIONS``, in their order."""
    dropout: float = 0.0
    """Of the adapters' inputs, while training."""
    scaling: Scaling = "rank"
    """``sqrt-rank`` is rsLoRA (arXiv 2312.03732)."""
    kind: Kind = "lora"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"--lora-rank {self.rank}: a rank is at least 1.")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"--lora-alpha {self.alpha:g}: must be greater than 0.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora-dropout {self.dropout:g}: must be at least 0 and less than 1.")

    @property
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    def differences(self, other: LoraConfig) -> list[str]:
        """Settings that make other adapters of it, as ``name: own instead of other's``; dropout is none of them."""
        own, others = asdict(self), asdict(other)
        return [f"{name}: {own[name]} instead of {others[name]}" for name in own if _differ(name, own, others)]


def _differ(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return name != "dropout" and own[name] != other[name]


def parse_targets(text: str, *, gated: bool) -> tuple[str, ...]:
    """Projections by their names and words for several, with commas between them.

    Args:
        gated: whether the model's MLPs have a gate projection.

    Raises:
        UserError: a name that is none, or of a projection that the model does not have.
    """
    there = [name for name in PROJECTIONS if gated or name != "gate_proj"]
    found: set[str] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word in GROUPS:
            found.update(name for name in GROUPS[word] if name in there)
        elif OTHER_NAMES.get(word, word) in there:
            found.add(OTHER_NAMES.get(word, word))
        else:
            missing = "the model has no such projection" if word in PROJECTIONS else "no such projection"
            raise UserError(f"--lora-targets {word}: {missing}. Possible: {', '.join([*GROUPS, *there])}.")
    if not found:
        raise UserError(f"--lora-targets names no projection. Possible: {', '.join([*GROUPS, *there])}.")
    return tuple(name for name in PROJECTIONS if name in found)
