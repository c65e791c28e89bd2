"""Rows of answers that nobody has judged, written again with a reward for each answer: ``--scored-rows``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.pool import IntArray, PairPool
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.ranked_answers import SCORES
from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.rewriting import Rewriting
from megatron_bdpo.data.row_reader import FormatSettings, RowReader, pair_rows
from megatron_bdpo.data.sources import Row
from megatron_bdpo.data.store import PairStore

type Rewards = npt.NDArray[np.float64]


class ScoredRows:
    """The rows of a pool's sources with a column ``scores``, and counts of what was written.

    A row has it whole or is left out: where an answer could not be read as tokens, or the row did not fit, it does not
    follow which reward is whose. An answer that says nothing has none: null.
    """

    def __init__(self, pool: PairPool, form: FormatSettings) -> None:
        self._pool, self._form = pool, form
        self.rows = self.answers = self.left_out = 0

    def lines(self, ids: IntArray, rewards: Rewards) -> Iterator[str]:
        """JSON lines.

        Args:
            ids: [A] of the answers that have been judged, as pairs of themselves.
            rewards: [A] of each.

        Raises:
            UserError: a source has changed since it was tokenized.
        """
        of_all = np.full(len(self._pool), np.nan)
        of_all[ids] = rewards
        for store, start in zip(self._pool.stores, self._pool.offsets.tolist(), strict=False):
            again = Rewriting(store.sources, store.info.settings["data"], self._form, store.source, store.row)
            yield from again.lines(partial(self._scores, store, of_all[start : start + len(store)]))
            self.rows, self.left_out = self.rows + again.written, self.left_out + again.left_out

    def told(self) -> str:
        """What was written, in words."""
        left_out = f", {self.left_out} rows left out," if self.left_out else ""
        return f"rewards of {self.answers} answers in {self.rows} rows{left_out}"

    def _scores(
        self, store: PairStore, rewards: Rewards, reader: RowReader, row: Row, ids: IntArray, where: str
    ) -> Row | None:
        """The column of a row whose answers all follow one prompt, and are judged."""
        is_one = len(np.unique(store.starts[ids, 0])) < 2
        scores = _of_answers(reader, row, rewards[ids].tolist()) if is_one and np.isfinite(rewards[ids]).all() else None
        if scores is None:
            return None
        self.answers += len(ids)
        return {SCORES: scores}


def _of_answers(reader: RowReader, row: Row, rewards: list[float]) -> list[float | None] | None:
    """Of each answer of a row; None where it does not follow which is whose."""
    says_something = []
    for form in pair_rows(row, reader):
        if isinstance(form, RowProblem):
            return None
        says_something.append(False)
        with suppress(RowProblem):
            parse_row(form)
            says_something[-1] = True
    if sum(says_something) != len(rewards):
        return None
    values = iter(rewards)
    return [next(values) if each else None for each in says_something]
