"""Where a step's time goes: each part of our job by itself, what it calls left out."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.common.gauges import Instant

REST = "other"
NAMES = ("data", "reference", "forward", "log-probs", "loss", "backward", "optimizer", REST)


class Sections:
    """Time by name: processor time of this process on a CPU, wall clock on a GPU, which is waited for at each border.

    Nested sections are taken out of those around them, so the sections add up to the whole.
    """

    def __init__(self) -> None:
        self._open = [REST]
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = _clock()

    def close(self) -> dict[str, float]:
        """Seconds of every section, up to now."""
        self._account()
        return {name: self.seconds[name] for name in NAMES}

    def wrap[**P, R](self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function, its time counted under ``name``."""

        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            self._account()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._account()
                self._open.pop()

        return timed

    def _account(self) -> None:
        now = _clock()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def of_a_job(self) -> Iterator[None]:
        """Within it, a preference run in this process is measured."""
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.optimizer import optimizer as optimizers
        from megatron.core.pipeline_parallel import schedules

        from megatron_bdpo.logprobs import fused_linear
        from megatron_bdpo.model.pair_gpt import ScoringOutputLayer
        from megatron_bdpo.training import batches, forward, pack_iterators
        from megatron_bdpo.training.reference import passes

        places: list[tuple[str, Any, str]] = [
            ("data", batches.PackBatch, "to_device"),
            ("reference", passes.ReferenceTable, "lookup"),
            ("forward", forward, "score_pack"),
            ("log-probs", ScoringOutputLayer, "forward"),
            ("loss", forward.PreferenceStep, "_loss_func"),
            ("backward", schedules, "backward_step"),
            ("optimizer", optimizers.MixedPrecisionOptimizer, "step"),
            ("optimizer", optimizers.FP32Optimizer, "step"),
            ("optimizer", optimizers.ChainedOptimizer, "step"),
            ("optimizer", DistributedDataParallel, "zero_grad_buffer"),
        ]
        backward = self.wrap("log-probs", fused_linear._FusedLogProbs.backward)
        with contextlib.ExitStack() as stack:
            for name, owner, function in places:
                replacement = self.wrap(name, getattr(owner, function))
                stack.enter_context(mock.patch.object(owner, function, replacement))
            stack.enter_context(mock.patch.object(fused_linear._FusedLogProbs, "backward", staticmethod(backward)))
            iterate = self._timed_packs(pack_iterators.iterate_packs)
            stack.enter_context(mock.patch.object(pack_iterators, "iterate_packs", iterate))
            yield

    def _timed_packs(self, iterate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def packs(*args: Any, **kwargs: Any) -> Iterator[Any]:
            following = self.wrap("data", iterate(*args, **kwargs).__next__)
            with contextlib.suppress(StopIteration):
                while True:
                    yield following()

        return packs


def _clock() -> float:
    now = Instant.now()
    return now.wall if torch.cuda.is_available() else now.processor
