"""A callback of another package: says which steps took much longer than those before them."""

import math
import statistics
from collections import deque

from megatron_bdpo.training.callbacks.callback import Callback, StepResult
from megatron_bdpo.training.distributed import say
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.settings import Settings


class SlowSteps(Callback):
    """A GPU that is too hot, or a file system that hangs, shows here first."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.seconds: deque[float] = deque(maxlen=100)

    def after_step(self, step: StepResult) -> None:
        usual = statistics.median(self.seconds) if len(self.seconds) >= 10 else math.inf
        if step.seconds > self.times * usual:
            say(f"WARNING: step {step.iteration} took {step.seconds:.1f} s, those before it {usual:.1f} s")
        self.seconds.append(step.seconds)


def slow_steps(settings: Settings, job: PairJob) -> Callback:
    """What the entry point names: called once, on every rank, before the model is built."""
    return SlowSteps(times=3)
