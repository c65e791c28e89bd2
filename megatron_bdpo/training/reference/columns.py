"""Reference log-probs as columns of the rows they are of, as TRL reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data import formats
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.records import ANSWER_REFERENCE, REFERENCE_COLUMNS
from megatron_bdpo.data.sources import SourceSpec, content_digest, describe_row, read_rows
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference.cache import Scores, open_scores


def add_columns(scores: Path, output: Path) -> tuple[int, int]:
    """Write the rows of scored pairs as JSON lines, with ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Of a labelled answer, ``ref_logps``.

    Args:
        scores: directory of a scoring job that has ended.
        output: the file; there must be none.

    Returns:
        How many rows were written, and how many were left out because they gave no pair, or none that was scored.

    Raises:
        UserError: the log-probs or a source cannot be read, or a row gave several pairs.
    """
    if output.exists():
        raise UserError(f"{output} is there already. Remove it, or name another file.")
    found, counts = open_scores(scores), [0, 0]
    try:
        write_whole(output, _lines(found, counts), replace=False)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    return counts[0], counts[1]


def _lines(found: Scores, counts: list[int]) -> Iterator[str]:
    """The rows, one after the other; ``counts`` are those written and left out so far."""
    digests = found.manifest["identity"]["data"]
    for index, source in enumerate(map(SourceSpec, found.manifest["sources"])):
        if content_digest(source) != digests[index]:
            raise UserError(f"{source.path} has changed since its pairs were scored. Score them again.")
        ids = np.flatnonzero((found.source == index) & np.isfinite(found.conditional).all(axis=1))
        by_row = dict(zip(found.row[ids].tolist(), found.conditional[ids].tolist(), strict=True))
        if len(by_row) < len(ids):
            rows, pairs = np.unique(found.row[ids], return_counts=True)
            several = describe_row(source, int(rows[np.argmax(pairs > 1)]))
            raise UserError(
                f"{several} has given several pairs, and has no room for the log-probs of each. Score a file in which "
                "every pair is a row, or one pair of each row: --pairs-from best-worst."
            )
        for number, row in read_rows(source):
            if isinstance(row, RowProblem) or number not in by_row:
                counts[1] += 1
                continue
            counts[0] += 1
            chosen, rejected = by_row[number]
            columns = dict(zip(REFERENCE_COLUMNS, (chosen, rejected), strict=True))
            if formats.is_labelled_form(row):
                columns = {ANSWER_REFERENCE: chosen}
            yield json.dumps({**row, **columns}, default=str) + "\n"  # a table's values may be dates, for example
