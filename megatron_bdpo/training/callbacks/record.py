"""Writes ``run.json``, what a run is, for people's own tools: see ``reporting.run_record``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_bdpo.training.callbacks.base import Callback, Start
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.reporting.provenance import provenance
from megatron_bdpo.training.reporting.run_record import write_record


class RunRecord(Callback):
    """Once, from the rank with the metrics, beside the checkpoints."""

    def __init__(self, arguments: Arguments, job: PairJob) -> None:
        self._arguments, self._job = arguments, job

    def after_load(self, start: Start) -> None:
        """Collective."""
        save = self._arguments.settings.directories.save
        with all_ranks_agree():
            if save and is_last_rank():
                write_record(
                    Path(save),
                    {
                        "loss": start.loss.spec.name,
                        "loss_options": asdict(start.loss.options),
                        "pairs": {"train": len(self._job.train.ids), "heldout": len(self._job.held_out.ids)},
                        "reference_scores": start.log_probs,
                        "imbalance_quartiles": start.imbalance_edges or None,
                        **provenance(self._arguments, self._job, start.identity),
                    },
                )
