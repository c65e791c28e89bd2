"""Pair files looked at without a tokenizer: which rows can be read, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable

from megatron_bdpo.data.records import RowProblem, parse_row
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec, describe_row, read_rows
from megatron_bdpo.errors import UserError


def check_rows(
    sources: tuple[SourceSpec, ...],
    on_problem: Callable[[str, RowProblem], None] = lambda where, problem: None,
    max_rows: int | None = None,
) -> DataReport:
    """Read every row as a training would, up to its tokens.

    Args:
        sources: the data sets.
        on_problem: told of each row that gives no pair, as it comes: where it is, and what is wrong with it.
        max_rows: of each source, only the first so many.

    Returns:
        The report, without lengths. What only tokens show (responses that are cut to the same, tokens that merge
        across the end of the prompt) is not in it.

    Raises:
        UserError: a source is missing, empty or unreadable, or some rows are strings and some chat messages.
    """
    report = DataReport([source.path for source in sources])
    forms: dict[bool, str] = {}
    for index, source in enumerate(sources):
        for number, row in read_rows(source):
            if max_rows is not None and report.rows_read[index] == max_rows:
                break
            report.rows_read[index] += 1
            try:
                if isinstance(row, RowProblem):
                    raise row
                forms.setdefault(parse_row(row).is_chat, describe_row(source, number))
            except RowProblem as problem:
                report.add_problem(index, number, problem.kind, problem.detail)
                on_problem(describe_row(source, number), problem)
                continue
            report.pairs_kept[index] += 1
    if len(forms) == 2:
        raise UserError(
            f"{forms[True]} holds chat messages, {forms[False]} strings. One run takes one form: convert one of them."
        )
    return report
