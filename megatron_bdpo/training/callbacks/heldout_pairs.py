"""Keeps the rewards of each held-out pair, for the report and anybody's tools: see ``reporting.heldout_file``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bdpo.training.batches import IntArray
from megatron_bdpo.training.callbacks.callback import Callback, Start
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank, sum_over_ranks
from megatron_bdpo.training.forward import PreferenceStep
from megatron_bdpo.training.reference.passes import is_one_of_each_replica
from megatron_bdpo.training.reporting.heldout_file import NAME, HeldOutFile, HeldOutRewards


class HeldOutPairs(Callback):
    """Gathers them from the replicas, and writes them on the last rank. P held-out pairs.

    The cost of an evaluation: [P, 3] numbers of 8 bytes, added up over the hosts.
    """

    def __init__(self, step: PreferenceStep, pairs: IntArray, tokens: npt.NDArray[np.integer], save: Path) -> None:
        """
        Args:
            step: told of every pack of an evaluation, it hands on the rewards.
            pairs: [P] ids.
            tokens: [P, 2] of the answers, chosen and rejected; 0 where a labelled answer has none beside it.
        """
        self._step, self._path = step, save / NAME
        order = np.argsort(pairs)
        self._pairs, self._tokens = pairs[order], tokens[order]
        self._seen: list[tuple[IntArray, Tensor]] = []
        self._file: HeldOutFile | None = None

    def after_load(self, start: Start) -> None:
        """Open the file at the step that the run starts from. Collective.

        Raises:
            UserError: on every rank; it cannot be read or written.
        """
        with all_ranks_agree():
            if is_last_rank():
                self._file = HeldOutFile(self._path, start.iteration)
        if len(self._pairs) and is_one_of_each_replica():
            self._step.observe = self.observe

    def observe(self, pairs: IntArray, rewards: Tensor) -> None:
        """The rewards [n, 2] of a pack's pairs stay on the device until the evaluation is over."""
        self._seen.append((pairs, rewards))

    def after_evaluation(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """Collective."""
        if not len(self._pairs):
            return
        seen, self._seen = self._seen, []
        table = torch.zeros(len(self._pairs), 3, dtype=torch.float64)  # rewards, and how often they were seen
        if seen:
            places = torch.from_numpy(np.searchsorted(self._pairs, np.concatenate([pairs for pairs, _ in seen])))
            table[places, :2] = torch.cat([rewards for _, rewards in seen]).double().cpu()
            table[places, 2] = 1
        rewards = sum_over_ranks(table).numpy()
        if self._file:
            known = rewards[:, 2] == 1
            self._file.add(HeldOutRewards(iteration, self._pairs[known], rewards[known, :2], self._tokens[known]))
