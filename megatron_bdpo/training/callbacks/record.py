"""Writes ``run.json``, what a run is, for people's own tools: see ``reporting.run_record``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bdpo.training.callbacks.callback import Callback, Start
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank
from megatron_bdpo.training.reporting.run_record import write_record

if TYPE_CHECKING:
    from megatron_bdpo.training.identity import RunIdentity


class RunRecord(Callback):
    """Once, from the rank with the metrics, beside the checkpoints."""

    def __init__(
        self, save: Path, pairs: Mapping[str, int], provenance: Callable[[RunIdentity], Mapping[str, Any]]
    ) -> None:
        """
        Args:
            pairs: how many there are, by use.
            provenance: what else the run's numbers depend on: see ``reporting.provenance``.
        """
        self._save, self._pairs, self._provenance = save, pairs, provenance

    def after_load(self, start: Start) -> None:
        """Collective.

        Raises:
            UserError: on every rank; the file cannot be written.
        """
        with all_ranks_agree():
            if is_last_rank():
                write_record(self._save, self._content(start))

    def _content(self, start: Start) -> dict[str, Any]:
        return {
            "loss": start.loss.spec.name,
            "loss_options": asdict(start.loss.options),
            "pairs": self._pairs,
            "reference_scores": start.log_probs,
            "imbalance_quartiles": start.imbalance_edges or None,
            **self._provenance(start.identity),
        }
