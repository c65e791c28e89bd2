"""What callbacks are told, made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_bdpo.losses import LossFunction, registry
from megatron_bdpo.training.callbacks.callback import Record, Start, StepResult

#: Metrics that every loss has.
METRICS = {
    "loss": 0.5,
    "rewards/accuracies": 0.75,
    "rewards/margins": 1.0,
    "rewards/chosen": 0.5,
    "rewards/rejected": -0.5,
    "logps/chosen": -20.0,
    "logps/rejected": -30.0,
}


def start(iteration: int = 0, *, reference: str = "", model: list[Any] | None = None) -> Start:
    """A run of DPO that begins, or goes on; ``reference`` is the directory of its reference's weights."""
    loss = LossFunction(registry.get("dpo"), registry.build_options("dpo", {}))
    identity: Any = SimpleNamespace(reference_weights=reference, base_weights="abc")
    return Start(model or [], iteration, loss, identity, {}, [])


def step(iteration: int, *, skipped: bool = False, seconds: float = 1.0, **metrics: float) -> StepResult:
    """One of 8 pairs and 100 tokens."""
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    return StepResult(iteration, values, skipped, seconds, pairs=8, tokens=100)


def steps_record(iteration: int, **metrics: float) -> Record:
    rates = {"throughput/pairs_per_second": 4.0, "throughput/tokens_per_second": 50.0}
    return Record("step", iteration, METRICS | metrics, rates)


def evaluation(iteration: int, **metrics: float) -> Record:
    return Record("evaluation", iteration, METRICS | metrics)
