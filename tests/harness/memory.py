"""What a rank of a tiny job really holds, in bytes: weights, gradients, optimizer, what autograd saves, at its peak."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from tests.harness.jobs import run_job


class SavedTensor(NamedTuple):
    """One that autograd holds."""

    by_attention: bool
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    """Of its storage."""


@dataclass
class Held:
    """Of one rank."""

    parameters: int = 0
    """Elements."""
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """After the last step: what its parameter groups and their state hold beside the weights."""
    saved: int = 0
    """Most bytes that autograd held at a moment of the last step."""
    saved_by_attention: int = 0
    """Of these, by the attention over pairs, which on a CPU is another than on a GPU."""
    tensors: list[SavedTensor] = field(default_factory=list)
    """Which they are."""
    parameter_tensors: int = 0
    pack_length: int = 0
    microbatches: int = 0
    scored: int = 0
    """Scored positions of a microbatch on this rank, at most, where there is an output layer."""
    keys: float = 0.0
    """Keys gathered per position of a pack, of the microbatches that were held."""


def count(flags: list[str], **overrides: Any) -> Held:
    """Run the tiny job and count on this rank."""
    from megatron_bdpo.training.run import PreferenceRun

    saved = SavedTensors()

    class CountingRun(PreferenceRun):
        held = Held()
        optimizer: Any = None

        def after_load(self, model: list[Any]) -> None:
            super().after_load(model)
            parameters = list({id(p): p for chunk in model for p in chunk.parameters()}.values())
            self.held.parameter_tensors = len(parameters)
            self.held.parameters = sum(p.numel() for p in parameters)
            self.held.weights = sum(p.numel() * p.element_size() for p in parameters)
            self.held.gradients = sum(_distinct(buffer.grad_data for buffer in _buffers(model)).values())
            saved.ignored = set(_distinct(p for chunk in model for p in chunk.parameters()))

        def wrap_schedule(self, schedule: Any) -> Any:
            inner = super().wrap_schedule(schedule)

            def run(*args: Any, forward_only: bool = False, **kwargs: Any) -> Any:
                if forward_only:
                    return inner(*args, forward_only=True, **kwargs)
                with saved.counted():
                    return inner(*args, forward_only=False, **kwargs)

            return run

    with _optimizer_seen() as optimizers, saved.model_watched():
        run, _ = run_job(flags, overrides, run_type=CountingRun)
    held = run.held
    (optimizer,) = optimizers
    held.optimizer = _optimizer_bytes(optimizer, saved.ignored)
    held.saved, held.tensors = saved.peak, saved.at_peak
    held.saved_by_attention = sum(tensor.bytes for tensor in saved.at_peak if tensor.by_attention)
    held.pack_length, held.microbatches = run.job.plan.longest, run.job.plan.microbatches
    # The masks of SDPA are none of a GPU's flash attention.
    masks = [tensor for tensor in saved.at_peak if tensor.by_attention and len(tensor.shape) == 2]
    held.keys = statistics.mean(saved.keys.values()) / held.pack_length if saved.keys else 1.0
    held.scored = saved.scored
    for tensor in masks:
        held.saved_by_attention -= tensor.bytes
        held.saved -= tensor.bytes
    return held


def _buffers(model: list[Any]) -> Iterator[Any]:
    for chunk in model:
        yield from (*chunk.buffers, *chunk.expert_parallel_buffers)


def _distinct(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Storage -> its bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@contextlib.contextmanager
def _optimizer_seen() -> Iterator[list[Any]]:
    import megatron.training.training as trainer

    seen: list[Any] = []
    original = trainer.get_megatron_optimizer

    def get(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(trainer, "get_megatron_optimizer", get):
        yield seen


def _optimizer_bytes(optimizer: Any, weights: set[int]) -> int:
    tensors = []
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in inner.optimizer.param_groups:
            tensors += group["params"]
        for state in inner.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(size for storage, size in _distinct(tensors).items() if storage not in weights)


class SavedTensors:
    """Counts the storages that autograd keeps, from the moment each is saved until its graph lets go of it.

    Indexes and what pairs count are not counted: they are the pack's own, in one piece of memory.
    """

    def __init__(self) -> None:
        self.ignored: set[int] = set()
        self.peak = 0
        self.at_peak: list[SavedTensor] = []
        self._users: dict[int, int] = {}
        self._live: dict[int, SavedTensor] = {}
        self._in_attention = False
        self.scored = 0
        self.keys: dict[int, int] = {}
        """Where the index of a pack's gathered keys is -> its length."""
        self._pack = 0  # memory of the one that was scored last

    @contextlib.contextmanager
    def model_watched(self) -> Iterator[None]:
        """Know which tensors the attention over pairs saves, and how many positions are scored."""
        from megatron_bdpo.model.attention import PairAttention
        from megatron_bdpo.model.pair_gpt import ScoringOutputLayer

        attend, score = PairAttention.forward, ScoringOutputLayer.forward

        def forward_attention(*args: Any, **kwargs: Any) -> Any:
            self._in_attention = True
            try:
                return attend(*args, **kwargs)
            finally:
                self._in_attention = False

        def forward_output(layer: Any, hidden_states: Any, weight: Any, context: Any) -> Any:
            self.scored = max(self.scored, context.scored.hidden.numel())
            self._pack = context.scored.hidden.untyped_storage().data_ptr()
            return score(layer, hidden_states, weight, context)

        with (
            mock.patch.object(PairAttention, "forward", forward_attention),
            mock.patch.object(ScoringOutputLayer, "forward", forward_output),
        ):
            yield

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is saved inside the block; a new peak each time."""
        self.peak, self.keys = 0, {}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor):
            yield

    def add(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if tensor.dtype == torch.int64:
            if self._in_attention:
                self.keys[tensor.data_ptr()] = len(tensor)
        elif key not in self.ignored and key != self._pack:
            self._users[key] = self._users.get(key, 0) + 1
            if key not in self._live:
                shape, dtype = tuple(tensor.shape), str(tensor.dtype)
                self._live[key] = SavedTensor(self._in_attention, shape, dtype, storage.nbytes())
            now = sum(live.bytes for live in self._live.values())
            if now > self.peak:
                self.peak, self.at_peak = now, list(self._live.values())
        return key

    def remove(self, key: int) -> None:
        if key in self._users:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._live[key]


class _Saved:
    """A saved tensor; it is let go of when this is."""

    def __init__(self, counter: SavedTensors, tensor: torch.Tensor) -> None:
        self.tensor, self._counter = tensor, counter
        self._key = counter.add(tensor)

    def __del__(self) -> None:
        self._counter.remove(self._key)
