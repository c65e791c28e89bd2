"""Adapters of PEFT's put into the weights of a Hugging Face model, tensor by tensor, without building the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.model.lora.peft_format import MAGNITUDE, PREFIX


@torch.no_grad()
def merged(name: str, weight: Tensor, adapters: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """A weight of the model with its adapter in it, in its own type; as it is where it has none.

    W + factor B A, computed in fp32; for DoRA each row then has the norm that the adapter says.

    Args:
        name: the weight's, as Hugging Face has it.
        weight: [out, in].
        adapters: all of them, by PEFT's names.
    """
    own = PREFIX + name.removesuffix(".weight")
    low, up = adapters.get(f"{own}.lora_A.weight"), adapters.get(f"{own}.lora_B.weight")
    if low is None or up is None:
        return weight
    moved = weight.float() + config.factor * (up.float() @ low.float())
    if config.kind == "dora":
        magnitude = adapters[own + MAGNITUDE].float()
        moved *= (magnitude / moved.norm(dim=1))[:, None]
    return moved.to(weight.dtype)
