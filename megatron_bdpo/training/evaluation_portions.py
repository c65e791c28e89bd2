"""An evaluation in portions, between which a stop is heard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_bdpo.platform.hooks import EvaluationLeft
from megatron_bdpo.training.distributed import broadcast
from megatron_bdpo.training.stopping import StopRequest, StopRequested

#: A portion takes about this long, without and with stages of a pipeline.
_SECONDS = (1.0, 4.0)


class EvaluationPortions:
    """A second of microbatches at a time.

    Each stage of a pipeline waits for the others in every portion: there they are larger.
    """

    def __init__(self, stop: StopRequest, stages: int, after_leaving: Callable[[], None]) -> None:
        """
        Args:
            stages: of the pipeline.
            after_leaving: called on all ranks when an evaluation ends without a result.
        """
        self._stop, self._stages, self._after_leaving = stop, stages, after_leaving
        self._was_left = False

    def run(self, evaluate: Callable[..., list[Any]], microbatches: int) -> list[Any]:
        """Evaluate so many microbatches. Collective.

        Args:
            evaluate: takes ``num_microbatches``.

        Raises:
            EvaluationLeft: on all ranks, when the run is to stop.
        """
        size = self._stages
        results: list[Any] = []
        while microbatches > 0:
            self.leave_if_asked()
            began, count = time.monotonic(), min(size, microbatches)
            results += evaluate(num_microbatches=count)
            microbatches -= count
            if microbatches:
                fitting = int(size * _SECONDS[self._stages > 1] / max(time.monotonic() - began, 1e-6))
                size = broadcast(self._stages * max(1, min(fitting, 2 * size) // self._stages))
        return results

    def leave_if_asked(self) -> None:
        """To be called now and then while an evaluation is on. Collective.

        Raises:
            EvaluationLeft: on all ranks, when the run is to stop.
        """
        if self._was_left or any(self._stop.signals_received()):
            self._was_left = True
            self._after_leaving()
            raise EvaluationLeft

    def leave_if_left(self) -> None:
        """A run without its last evaluation is not finished.

        Raises:
            StopRequested: on all ranks.
        """
        if self._was_left:
            raise StopRequested(self._stop.reason)
