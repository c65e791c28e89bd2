"""Rows written again as JSON lines, with columns of what a scoring job has found for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.row_reader import FormatSettings, RowReader, row_readers
from megatron_bdpo.data.sources import Row, SourceSpec, content_digest, describe_row, read_rows
from megatron_bdpo.errors import UserError

IntArray = npt.NDArray[np.int64]

type ColumnsOf = Callable[[RowReader, Row, IntArray, str], Row | None]
"""A row, the ids of its pairs, which may be none, and where it is, to its columns; None: it is left out."""


@dataclass
class Rewriting:
    """The rows of sources, with columns more; and how many have been written and left out."""

    sources: Sequence[SourceSpec]
    digests: Sequence[str]
    """Of what the sources held when their pairs were scored."""
    form: FormatSettings
    source: npt.NDArray[np.integer]
    """[P] of each pair; those of a row lie beside each other."""
    row: npt.NDArray[np.integer]
    """[P]"""
    written: int = 0
    left_out: int = 0

    def lines(self, columns: ColumnsOf) -> Iterator[str]:
        """Row after row.

        Raises:
            UserError: a source cannot be read, or is not what it was.
        """
        for source, digest in zip(self.sources, self.digests, strict=True):
            if content_digest(source) != digest:
                raise UserError(f"{source.path} has changed since its rows were scored. Score them again.")
        for index, (source, reader) in enumerate(zip(self.sources, row_readers(self.sources, self.form), strict=True)):
            ids = self._by_row(index)
            for number, row in read_rows(source):
                found = None
                if not isinstance(row, RowProblem):
                    found = columns(reader, row, ids.get(number, _NONE), describe_row(source, number))
                if isinstance(row, RowProblem) or found is None:
                    self.left_out += 1
                    continue
                self.written += 1
                yield json.dumps({**row, **found}, default=str) + "\n"  # a table's values may be dates, for example

    def _by_row(self, source: int) -> dict[int, IntArray]:
        """The ids of each row's pairs."""
        ids = np.flatnonzero(self.source == source)
        numbers, starts = np.unique(self.row[ids], return_index=True)
        return dict(zip(numbers.tolist(), np.split(ids, starts)[1:], strict=True))


_NONE = np.zeros(0, np.int64)
