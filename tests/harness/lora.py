"""Adapters that PEFT makes, and what PEFT and transformers say of a step of DPO with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import response_log_probs
from tests.harness.tiny_models import load_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, target: Path, *, rank: int = 4, targets: list[str] | None = None, **settings: Any) -> Path:
    """Adapters of a model on disk, none of whose weights is zero."""
    import peft

    torch.manual_seed(11)
    config = peft.LoraConfig(
        r=rank, lora_alpha=6, target_modules=targets or ALL, task_type="CAUSAL_LM", lora_dropout=0.0, **settings
    )
    model = peft.get_peft_model(load_model(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn_like(weight))
            if "lora_magnitude" in name:
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
    model.save_pretrained(target)
    return target


def load_adapter(base: Path, adapter: Path) -> Any:
    """PEFT's model of the two, whose adapters can be trained."""
    import peft

    return peft.PeftModel.from_pretrained(load_model(base), adapter, is_trainable=True)


def tensors_of(adapter: Path) -> dict[str, torch.Tensor]:
    """By PEFT's names in files."""
    return load_file(adapter / "adapter_model.safetensors")


def step_of_dpo(model: Any, store: PairStore, *, beta: float, lr: float) -> float:
    """One step of plain SGD on the mean DPO loss of all pairs against the base. Returns the loss."""
    model.eval()
    total = 0.0
    for row in range(len(store)):
        pair = store.pair(row)
        with torch.no_grad(), model.disable_adapter():
            chosen, rejected = (_sum(model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        margin = _sum(model, pair.prompt, pair.chosen) - _sum(model, pair.prompt, pair.rejected)
        loss = -torch.nn.functional.logsigmoid(beta * (margin - (chosen - rejected))) / len(store)
        loss.backward()
        total += loss.item()
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=lr).step()
    return total


def _sum(model: Any, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    return response_log_probs(model, prompt, answer).sum()
