"""One job measured in two layouts: log-probs, losses, gradients and weights as wholes, and how far they are apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.harness.jobs import TINY_JOB, TINY_MODEL, Shard, assemble, copy_shards

#: Adam divides by the root of the second moment plus adam_eps. With one as small as usual an element whose gradient is
#: nothing but rounding moves by the whole learning rate in either direction; with this one it hardly moves.
WELL_CONDITIONED = {"adam_eps": 1e-2, "lr": 1e-2}


@dataclass
class Measured:
    """What one rank saw of its run."""

    log_probs: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """(step, pair id) -> policy, reference and unconditional log-probs of chosen and rejected, as far as known."""
    losses: list[dict[str, float]] = field(default_factory=list)
    gradients: list[list[Shard]] = field(default_factory=list)
    """After each step's backward, as the optimizer takes them."""
    weights: list[Shard] = field(default_factory=list)
    """After the last step."""


def measure(flags: list[str], overrides: dict[str, Any], change: Callable[[Any], None] | None = None) -> Measured:
    """Run the tiny job on this rank, possibly with something broken.

    Args:
        flags: layout and loss.
        overrides: argument defaults by name.
        change: called with an undo stack (``contextlib.ExitStack``) before the run: breaks the code for its length.
    """
    import contextlib

    from megatron_bdpo.training import arguments, distributed

    with contextlib.ExitStack() as undo:
        if change is not None:
            change(undo)
        args = arguments.parse(flags, TINY_MODEL | TINY_JOB | WELL_CONDITIONED | overrides)
        with distributed.process_groups(args):
            run = _measured_run(args)
            run.pretrain()
    run.seen.losses = run.progress.steps
    return run.seen


def _measured_run(args: Any) -> Any:
    from megatron_bdpo.training.run import PreferenceRun

    class MeasuredRun(PreferenceRun):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            self.seen = Measured()
            self._step.loss = self._recorded(self._step.loss)

        def _recorded(self, loss: Any) -> Any:
            def record(batch: Any, policy: Any, *others: Any) -> Any:
                if policy.requires_grad:  # training, not the check of the first step
                    known = torch.stack([policy, *(other for other in others if other is not None)]).detach()
                    for pair, values in zip(batch.pair_ids, known.reshape(len(known), -1, 2).unbind(1), strict=True):
                        self.seen.log_probs[self._iteration, int(pair)] = values.numpy()
                return loss(batch, policy, *others)

            return record

        def after_load(self, model: Any) -> None:
            self.model = model
            super().after_load(model)

        def wrap_schedule(self, schedule: Any) -> Any:
            inner = super().wrap_schedule(schedule)

            def run(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
                result = inner(*args, forward_only=forward_only, **kwargs)
                if not forward_only:
                    self.seen.gradients.append(_copy_gradients(self.model))
                return result

            return run

        def after_step(self, losses: Any, iteration: int, skipped: bool) -> None:
            super().after_step(losses, iteration, skipped)
            if iteration == self.args.train_iters:
                self.seen.weights = copy_shards(self.model)

    return MeasuredRun(args)


@torch.no_grad()
def _copy_gradients(model: list[Any]) -> list[Shard]:
    """This rank's main copies of the gradients, named and placed as the weights are. Collective."""
    for chunk in model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            _complete(buffer)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    try:
        return copy_shards(model)
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _complete(buffer: Any) -> None:
    """With the distributed optimizer each rank has reduced its own part of the gradients: gather the others'."""
    if not buffer.ddp_config.use_distributed_optimizer:
        return
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        own = bucket.grad_data.view(-1).chunk(group.size())[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data.view(-1), own, group=group)


# Wholes and their distance --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A run as one: no ranks."""

    log_probs: dict[tuple[int, int], np.ndarray]
    losses: np.ndarray  # [steps]
    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]


def whole(measured: list[Measured]) -> Whole:
    """Put the ranks' parts together; what several ranks have must agree."""
    log_probs: dict[tuple[int, int], np.ndarray] = {}
    for key, values in itertools.chain.from_iterable(each.log_probs.items() for each in measured):
        np.testing.assert_allclose(values, log_probs.setdefault(key, values), rtol=1e-6)
    steps = len(measured[0].gradients)
    return Whole(
        log_probs=log_probs,
        losses=np.array([step["loss"] for step in measured[-1].losses]),
        gradients=[assemble(each.gradients[step] for each in measured) for step in range(steps)],
        weights=assemble(each.weights for each in measured),
    )


def deviations(found: Whole, expected: Whole) -> dict[str, float]:
    """The largest relative deviation of each quantity.

    Log-probs relative to the largest one, losses each to itself, gradients and weights per tensor to its largest
    element, which is at least a thousandth of the largest element of all.
    """
    assert found.log_probs.keys() == expected.log_probs.keys()
    assert len(found.losses) == len(expected.losses)
    largest = max(float(np.abs(values).max()) for values in expected.log_probs.values())
    return {
        "log-probs": max(_off(found.log_probs[key], value) for key, value in expected.log_probs.items()) / largest,
        "loss": float(np.max(np.abs(found.losses - expected.losses) / np.abs(expected.losses))),
        "gradients": max(map(_worst_tensor, found.gradients, expected.gradients)),
        "weights": _worst_tensor(found.weights, expected.weights),
    }


def _worst_tensor(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    scales = {name: float(np.abs(value).max()) for name, value in expected.items()}
    floor = max(scales.values()) / 1000
    return max(_off(found[name], value) / max(scales[name], floor) for name, value in expected.items())


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0))


def beyond(found: dict[str, float], allowed: dict[str, float]) -> dict[str, float]:
    """The quantities that are off by more than allowed; a NaN is."""
    return {name: value for name, value in found.items() if not value <= allowed[name]}


def worst(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    """Per quantity, the largest deviation of several comparisons."""
    tables = list(tables)
    return {name: max(table[name] for table in tables) for name in tables[0]}
