"""Reference log-probs as columns of the rows they are of, as TRL reads and writes them, or of each answer of a list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data.grouping import by_row
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.ranked_answers import RESPONSES, RESPONSES_REFERENCE
from megatron_bdpo.data.records import ANSWER_REFERENCE, REFERENCE_COLUMNS, is_labelled, parse_row
from megatron_bdpo.data.row_reader import FormatSettings, RowReader, row_readers
from megatron_bdpo.data.sources import Row, SourceSpec, content_digest, describe_row, read_rows
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference.cache import Scores, open_scores

type LogProbs = npt.NDArray[np.float64]
"""Of the pairs of a row, in the store's order: [pairs, 2], chosen and rejected."""


def add_columns(scores: Path, output: Path) -> tuple[int, int]:
    """Write the scored rows as JSON lines with their log-probs, in nats.

    Pairs get ``ref_chosen_logps`` and ``ref_rejected_logps``, labelled answers ``ref_logps``, rows of the format
    ``responses`` ``ref_responses_logps``, null for an answer that is in no pair.

    Args:
        scores: directory of a scoring job that has ended.
        output: the file; there must be none.

    Returns:
        How many rows were written, and how many were left out: they gave no pair, or none that was scored, or it does
        not follow which log-prob is whose, because not all pairs of several have been kept or share one prompt.

    Raises:
        UserError: the log-probs or a source cannot be read, or its format reads no log-probs.
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
    identity = found.manifest["identity"]
    sources = [SourceSpec(path) for path in found.manifest["sources"]]
    for source, digest in zip(sources, identity["data"], strict=True):
        if content_digest(source) != digest:
            raise UserError(f"{source.path} has changed since its pairs were scored. Score them again.")
    settings = FormatSettings.parse(**{name: identity[name] for name in _DECISIVE if name in identity})
    for index, reader in enumerate(row_readers(sources, settings)):
        by_row = _by_row(found, index)
        for number, row in read_rows(sources[index]):
            if isinstance(row, RowProblem) or number not in by_row:
                counts[1] += 1
                continue
            columns = _columns(reader, row, by_row[number], describe_row(sources[index], number))
            if columns is None:
                counts[1] += 1
                continue
            counts[0] += 1
            yield json.dumps({**row, **columns}, default=str) + "\n"  # a table's values may be dates, for example


#: What the scored pairs were made with, by the flags' names: see ``FormatSettings.decisive``.
_DECISIVE = ("pair_format", "pair_columns", "pairs_from", "pair_preference")


def _by_row(found: Scores, source: int) -> dict[int, LogProbs]:
    """The log-probs of each row of a source all of whose kept pairs are scored."""
    ids = np.flatnonzero(found.source == source)
    values = ((row, found.conditional[of_row]) for row, of_row in by_row(ids, found.row[ids]))
    return {row: pairs for row, pairs in values if np.isfinite(pairs).all()}


def _columns(reader: RowReader, row: Row, log_probs: LogProbs, where: str) -> Row | None:
    """The columns that the row's format reads; None where it does not follow which value is whose."""
    reads, is_ours = reader.format.reads, reader.format.is_ours
    if RESPONSES_REFERENCE in reads:
        of_answers = _of_answers(reader, row, log_probs)
        return None if of_answers is None else {RESPONSES_REFERENCE: of_answers}
    if is_labelled(row) if is_ours else ANSWER_REFERENCE in reads:
        return {ANSWER_REFERENCE: log_probs[0, 0].item()}
    if not (is_ours or REFERENCE_COLUMNS[0] in reads):
        raise UserError(
            f"{where} is of the format {reader.format.name}, which has no column for log-probs. Score rows of pairs "
            f"(prompt, chosen, rejected) or of the format {RESPONSES} instead."
        )
    return dict(zip(REFERENCE_COLUMNS, log_probs[0].tolist(), strict=True))


def _of_answers(reader: RowReader, row: Row, log_probs: LogProbs) -> list[float | None] | None:
    """Of each answer of a row, in its order; None for one in no pair.

    Which two answers a pair has is found by marking each with a log-prob of its own.
    """
    count = len(row[dict(reader.settings.columns).get(RESPONSES, RESPONSES)])
    marks = [-1.0 - number for number in range(count)]
    pairs: list[Any] = []
    for form in reader.records({**row, RESPONSES_REFERENCE: marks}):
        if not isinstance(form, RowProblem):
            with suppress(RowProblem):
                pairs.append(parse_row(form))
    if len(pairs) != len(log_probs) or any(pair.prompt != pairs[0].prompt for pair in pairs):
        return None
    values: list[float | None] = [None] * count
    for pair, both in zip(pairs, log_probs.tolist(), strict=True):
        for mark, value in zip(pair.reference, both, strict=True):
            values[marks.index(mark)] = value
    return values
