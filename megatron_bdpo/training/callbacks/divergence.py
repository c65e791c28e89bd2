"""Ends a run whose policy has diverged in finite numbers; those that are not finite end in ``training.finite``."""

from __future__ import annotations

from megatron_bdpo.training.callbacks.callback import Callback, Record
from megatron_bdpo.training.finite import DivergedError

#: The chosen answers' log-prob at the first record, times this, less nats: losses that push it down stay far above.
_TIMES, _NATS = 30.0, 1000.0


class Divergence(Callback):
    """Compares what the policy makes of the chosen answers with the first record of this start."""

    def __init__(self, suspect: str) -> None:
        """
        Args:
            suspect: see ``suspects.likely_cause``.
        """
        self._suspect = suspect or "--lr. Lower it, and look at the options of the loss."
        self._first: float | None = None

    def after_record(self, record: Record) -> None:
        """
        Raises:
            DivergedError: on this rank; the step's checkpoint is not written.
        """
        now = record.metrics.get("logps/chosen")
        if record.kind != "step" or now is None:
            return
        if self._first is None:
            self._first = now
        elif now < _TIMES * self._first - _NATS:
            raise DivergedError(
                f"the policy has diverged by step {record.iteration}: to the chosen answers it gives a log-prob of "
                f"{now:,.0f} nats, {self._first:,.0f} at first. The likely cause is {self._suspect} Then begin again, "
                "with --overwrite or in another --save."
            )
