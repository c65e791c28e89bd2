"""How the rows of each source are read: their columns renamed, their format recognised or named, pairs made of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_bdpo.data import formats
from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.formats import AUTO, RowFormat
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.ranked_answers import RESPONSES
from megatron_bdpo.data.sources import Row, SourceSpec, describe_row, read_rows
from megatron_bdpo.errors import UserError

_LOOKED_AT = 100  # rows of a source, for one whose format is known


@dataclass(frozen=True)
class FormatSettings:
    """What the user says about the form of the rows. The same for all sources."""

    format: str = AUTO
    """Name of a format; auto: of each source the one that its first readable row has."""

    columns: tuple[tuple[str, str], ...] = ()
    """(column that the format reads, column of the rows that stands for it)."""

    pairs_from: str | None = None
    """Of more than two ranked answers; None: ``usual_pairs_from``."""

    preference: str | None = None
    """Of answers that are judged twice; None: ``FormatOptions.preference``."""

    usual_pairs_from: str = FormatOptions.pairs_from
    """What the job takes of ranked answers, unless the user says something else."""

    each_answer: bool = False
    """See ``FormatOptions.each_answer``."""

    @classmethod
    def parse(
        cls,
        pair_format: str = AUTO,
        pair_columns: str | None = None,
        pairs_from: str | None = None,
        pair_preference: str | None = None,
        usual_pairs_from: str = FormatOptions.pairs_from,
        each_answer: bool = False,
    ) -> FormatSettings:
        """From the flags of these names.

        Raises:
            UserError: an unknown format, or columns that are not named right.
        """
        known = formats.COLUMNS if pair_format == AUTO else formats.named(pair_format).reads
        columns = _parse_columns(pair_columns, known)
        settings = cls(pair_format, columns, pairs_from, pair_preference, usual_pairs_from, each_answer)
        _ = settings.options  # raises for what is no option
        return settings

    @property
    def options(self) -> FormatOptions:
        preference = FormatOptions.preference if self.preference is None else self.preference
        return FormatOptions(self.pairs_from or self.usual_pairs_from, preference, self.each_answer)

    def decisive(self) -> dict[str, Any]:
        """What decides the pairs, by name; nothing where all is as by default."""
        changed: dict[str, Any] = {"pair_format": self.format} if self.format != AUTO else {}
        if self.columns:
            changed["pair_columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in sorted(self.columns))
        default = FormatOptions()
        if self.options.pairs_from != default.pairs_from:
            margin = self.options.margin  # however it is written
            changed["pairs_from"] = self.options.pairs_from if margin is None else f"margin:{margin!r}"
        if self.options.preference != default.preference:
            changed["pair_preference"] = self.options.preference
        if self.each_answer:
            changed["each_answer"] = True
        return changed


#: Nothing said: every source is recognised.
RECOGNISED = FormatSettings()


def _parse_columns(text: str | None, known: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """``prompt=question,chosen=answer_a``."""
    columns: list[tuple[str, str]] = []
    for part in text.split(",") if text is not None else ():
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not (ours and equals and theirs):
            raise UserError(
                f"--pair-columns: {part.strip()!r} does not name two columns. Write our column, =, and yours: "
                "prompt=question,chosen=answer_a."
            )
        if ours not in known:
            raise UserError(f"--pair-columns: no format reads a column {ours!r}. Known are {', '.join(known)}.")
        for side, name in enumerate((ours, theirs)):
            if name in (pair[side] for pair in columns):
                raise UserError(f"--pair-columns: {name!r} is named twice on the same side of =. Name it once.")
        columns.append((ours, theirs))
    return tuple(columns)


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source. It can be sent to another process."""

    format: RowFormat
    settings: FormatSettings
    known_from: str
    """Why this format, in words."""

    def records(self, row: Row) -> Sequence[Row | RowProblem]:
        """The row as one or several that ``records.parse_row`` reads, or why a pair of it cannot be.

        Raises:
            RowProblem: it does not have the form of this source, or no pair can be made of it.
        """
        row = _renamed(row, self.settings.columns)
        try:
            self._refuse_other_forms(row)
            return self.format.rows(row, self.settings.options)
        except RowProblem as problem:
            if problem.kind.malformed:
                raise RowProblem(problem.kind, f"{problem.detail} ({self.known_from})") from None
            raise

    def _refuse_other_forms(self, row: Row) -> None:
        """Where the format was recognised. Those that are read as they are may be mixed."""
        other = formats.recognise(row) if self.settings.format == AUTO else None
        if other and other is not self.format and not (other.is_ours and self.format.is_ours):
            form = f"the row has the form of {other.name}, and needs a source of its own"
            raise RowProblem(ProblemKind.WRONG_TYPE, form)

    def unread(self, row: Row) -> list[str]:
        """Columns of the row that nobody reads, and that are not left out for a known reason; see `RowFormat`."""
        renamed = {theirs for _, theirs in self.settings.columns}
        replaced = {ours for ours, _ in self.settings.columns if row.get(ours) is not None} - renamed
        return sorted({*self.format.unread({k: v for k, v in row.items() if k not in renamed}), *replaced})


def row_readers(sources: Sequence[SourceSpec], settings: FormatSettings) -> list[RowReader]:
    """One for each source. Of a source whose format is not named, the first rows are read.

    Raises:
        UserError: a source is missing, empty or unreadable.
    """
    return [_reader(source, settings) for source in sources]


def _reader(source: SourceSpec, settings: FormatSettings) -> RowReader:
    if settings.format != AUTO:
        known_from = f"read as {settings.format}, as --pair-format says"
        return RowReader(formats.named(settings.format), settings, known_from)
    for number, row in itertools.islice(read_rows(source), _LOOKED_AT):
        with contextlib.suppress(RowProblem):
            if isinstance(row, dict) and (found := formats.recognise(_renamed(row, settings.columns))):
                where = describe_row(source, number)
                known_from = f"read as {found.name}, the format of {where}; --pair-format names another"
                return RowReader(found, settings, known_from)
    unknown = "the first rows have no known format: name it with --pair-format, or their columns with --pair-columns"
    return RowReader(formats.named("trl"), settings, unknown)


def pair_rows(row: Row | RowProblem, reader: RowReader) -> Sequence[Row | RowProblem]:
    """What ``read_rows`` yields, as what ``records.parse_row`` reads. One problem, or one or several rows.

    In reports each of them counts as a row.
    """
    if isinstance(row, RowProblem):
        return [row]
    try:
        return reader.records(row)
    except RowProblem as problem:
        return [problem]


def row_of(source: SourceSpec, wanted: int) -> Row | RowProblem:
    """One row of a source by its number, as ``read_rows`` gives it.

    Raises:
        UserError: there is no such row.
    """
    number = 0
    for number, row in read_rows(source):
        if number == wanted:
            return row
        if number > wanted:
            raise UserError(f"{describe_row(source, wanted)} is blank. The next row is {number}: --row {number}.")
    raise UserError(f"{describe_row(source, wanted)} is not there. The last one is {number}: --row {number}.")


def refuse_unused(settings: FormatSettings, readers: Iterable[RowReader]) -> None:
    """Raise UserError for an option that makes no difference to any source."""
    used = {name for reader in readers for name in reader.format.uses}
    for flag, name, value in (
        ("--pairs-from", "pairs_from", settings.pairs_from),
        ("--pair-preference", "preference", settings.preference),
    ):
        if value is not None and name not in used:
            users = ", ".join(each.name for each in formats.FORMATS if name in each.uses)
            found = ", ".join(sorted({reader.format.name for reader in readers}))
            raise UserError(
                f"{flag} {value} makes no difference to pairs of the format {found}. It is for {users}: leave it out, "
                "or name the format with --pair-format."
            )


def refuse_other_rows(readers: Iterable[RowReader], sources: Iterable[SourceSpec], flag: str) -> None:
    """Raise UserError, with the flag's name, for a source that is not of the format ``responses``."""
    for reader, source in zip(readers, sources, strict=True):
        if reader.format.name != RESPONSES:
            raise UserError(
                f"{flag} is for rows with a column {RESPONSES}, and {source.path} has others: {reader.known_from}. "
                "Give each row a prompt and its answers in a list, or name your columns: "
                f"--pair-columns {RESPONSES}=answers."
            )


def _renamed(row: Row, columns: Iterable[tuple[str, str]]) -> Row:
    """The row with our names for its columns."""
    if not columns:
        return row
    for ours, theirs in columns:
        if theirs not in row:
            raise RowProblem(
                ProblemKind.MISSING_COLUMN,
                f"column '{theirs}', which --pair-columns names for '{ours}', is missing; the row has "
                f"{', '.join(sorted(row)) or 'no columns'}",
            )
    taken = {theirs for _, theirs in columns}
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {ours: row[theirs] for ours, theirs in columns}
