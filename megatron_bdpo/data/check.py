"""Pair files looked at without a tokenizer: which rows can be read, and what is wrong with the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from megatron_bdpo.data.messages import Message
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.row_reader import RECOGNISED, FormatSettings, RowReader, pair_rows, refuse_unused, row_readers
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec, describe_row, read_rows
from megatron_bdpo.data.tokenized_rows import Outcome
from megatron_bdpo.errors import UserError


def check_rows(
    sources: tuple[SourceSpec, ...],
    on_problem: Callable[[str, RowProblem], None] = lambda where, problem: None,
    max_rows: int | None = None,
    form: FormatSettings = RECOGNISED,
    on_reader: Callable[[RowReader], None] = lambda reader: None,
    on_pair: Callable[[int, int, PreferenceRecord], None] = lambda source, row, record: None,
) -> DataReport:
    """Read every row as a training run would, up to its tokens.

    Args:
        sources: the data sets.
        on_problem: told of each row that gives no pair, as it comes: where it is, and what is wrong with it.
        max_rows: of each source, only the first so many.
        form: of the rows.
        on_reader: told of each source how its rows are read, before any row.
        on_pair: told of each pair, as it comes: index of its source, number of its row.

    Returns:
        The report, without lengths. What only tokens show (responses that are cut to the same, tokens that merge
        across the end of the prompt) is not in it.

    Raises:
        UserError: a source is missing, empty or unreadable, or some rows are strings and some chat messages.
    """
    report = DataReport([source.path for source in sources])
    forms: dict[bool, tuple[SourceSpec, int]] = {}
    readers = row_readers(sources, form)
    refuse_unused(form, readers)
    for reader in readers:
        on_reader(reader)
    for index, (source, reader) in enumerate(zip(sources, readers, strict=True)):
        outcome, pairs = Outcome(), 0
        for number, row in itertools.islice(read_rows(source), max_rows):
            prompts: list[str | list[Message]] = []  # of the row's pairs, each once: they are its groups
            for place, record in enumerate(pair_rows(row, reader)):
                outcome.add_read(place)
                try:
                    if isinstance(record, RowProblem):
                        raise record
                    pair = parse_row(record)
                    forms.setdefault(pair.is_chat, (source, number))
                    on_pair(index, number, pair)
                    outcome.add_label(pair.label)
                    pairs += 1
                    if pair.prompt not in prompts:
                        prompts.append(pair.prompt)
                except RowProblem as problem:
                    outcome.add_problem(number, problem.kind, problem.detail)
                    on_problem(describe_row(source, number), problem)
            report.groups += len(prompts)
            if not isinstance(row, RowProblem):
                outcome.add_unread(f"column {name}" for name in reader.unread(row))
        report.add(index, pairs, outcome)
    if len(forms) == 2:
        raise UserError(
            f"{describe_row(*forms[True])} holds chat messages, {describe_row(*forms[False])} strings. One run takes "
            "one form: convert one of them."
        )
    return report
