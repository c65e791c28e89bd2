"""Rows of answers that nobody has judged, written again with a reward for each answer: ``--scored-rows``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.grouping import by_row
from megatron_bdpo.data.pool import IntArray, PairPool
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.ranked_answers import SCORES
from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.row_reader import FormatSettings, RowReader, pair_rows, row_readers
from megatron_bdpo.data.sources import Row, content_digest, read_rows
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError

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
            of_store = of_all[start : start + len(store)]
            digests = store.info.settings["data"]
            for index, reader in enumerate(row_readers(store.sources, self._form)):
                source = store.sources[index]
                if content_digest(source) != digests[index]:
                    raise UserError(f"{source.path} has changed while its answers were judged. Start again.")
                by_row = _by_row(store, index, of_store)
                for number, row in read_rows(source):
                    scores = _of_answers(reader, row, by_row.get(number, []))
                    if isinstance(row, RowProblem) or scores is None:
                        self.left_out += 1
                        continue
                    self.rows, self.answers = self.rows + 1, self.answers + sum(each is not None for each in scores)
                    yield json.dumps({**row, SCORES: scores}, default=str) + "\n"  # a table's values may be dates

    def told(self) -> str:
        """What was written, in words."""
        left_out = f", {self.left_out} rows left out," if self.left_out else ""
        return f"rewards of {self.answers} answers in {self.rows} rows{left_out}"


def _by_row(store: PairStore, source: int, rewards: Rewards) -> dict[int, list[float]]:
    """The rewards of each row of a source all of whose answers follow one prompt, and are judged."""
    ids = np.flatnonzero(store.source == source)
    found = {}
    for row, of_row in by_row(ids, store.row[ids]):
        if np.isfinite(rewards[of_row]).all() and (store.starts[of_row, 0] == store.starts[of_row[0], 0]).all():
            found[row] = rewards[of_row].tolist()
    return found


def _of_answers(reader: RowReader, row: Row | RowProblem, rewards: list[float]) -> list[float | None] | None:
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
