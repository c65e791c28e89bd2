"""Reference log-probs as columns of the rows they are of, as TRL reads and writes them, or of each answer of a list."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.ranked_answers import RESPONSES, RESPONSES_REFERENCE
from megatron_bdpo.data.records import ANSWER_REFERENCE, REFERENCE_COLUMNS, is_labelled, parse_row
from megatron_bdpo.data.rewriting import IntArray, Rewriting
from megatron_bdpo.data.row_reader import FormatSettings, RowReader
from megatron_bdpo.data.sources import Row, SourceSpec
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference.cache import open_scores

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
    found = open_scores(scores)
    identity, sources = found.manifest["identity"], [SourceSpec(path) for path in found.manifest["sources"]]
    form = FormatSettings.parse(**{name: identity[name] for name in _DECISIVE if name in identity})
    again = Rewriting(sources, identity["data"], form, found.source, found.row)
    try:
        write_whole(output, again.lines(partial(_columns, found.conditional)), replace=False)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    return again.written, again.left_out


#: What the scored pairs were made with, by the flags' names: see ``FormatSettings.decisive``.
_DECISIVE = ("pair_format", "pair_columns", "pairs_from", "pair_preference")


def _columns(all_log_probs: LogProbs, reader: RowReader, row: Row, ids: IntArray, where: str) -> Row | None:
    """The columns that the row's format reads; None where a pair is not scored, or it does not follow which value is
    whose."""
    log_probs = all_log_probs[ids]
    if not len(ids) or not np.isfinite(log_probs).all():
        return None
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
