"""What became of the rows: how many gave pairs, why the others did not, and how long the pairs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.labels import DESIRABLE, UNDESIRABLE, UNJUDGED
from megatron_bdpo.data.problems import ProblemKind, printable
from megatron_bdpo.data.tokenized_rows import (
    MAX_EXAMPLES,
    PAIR,
    Outcome,
    Problem,
    first_pairs,
    first_rows,
)
from megatron_bdpo.display import Block, Table, plain
from megatron_bdpo.json_shape import Each, is_count, is_number, schema_error

_MAX_LINES = 20
#: What tokens of answers that nobody has judged are told as.
_ANSWER = "answer"
_MAX_NAMES = 12
_MAX_SPELLED = 4


@dataclass
class ProblemCount(Problem):
    """How often one kind of problem came up in one source."""

    source: int
    """Index of the source."""


@dataclass
class SpelledOut:
    """How many pairs of one source hold a control token as text."""

    token: str
    source: int
    """Index of the source."""
    count: int
    rows: list[int]
    """Numbers of the first few rows."""


@dataclass(frozen=True)
class LengthStats:
    """Mean, median, 95th percentile and maximum of a length, in tokens."""

    mean: float
    p50: float
    p95: float
    max: int


@dataclass
class DataReport:
    """Counts over all rows read. `rows_read` = `pairs_kept` + the counts of `problems`.

    A row that gives several pairs counts as often, but once in `rows`.
    """

    sources: list[str]
    rows_read: list[int] = field(default_factory=list)  # per source
    pairs_kept: list[int] = field(default_factory=list)  # per source
    problems: list[ProblemCount] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)  # columns and fields that nothing reads -> rows that have them
    spelled_out: list[SpelledOut] = field(default_factory=list)
    """Control tokens that texts spell out. They become real ones."""
    truncated_prompts: int = 0
    truncated_responses: int = 0  # a pair counts twice when both of its responses are cut
    tokens: dict[str, LengthStats] = field(default_factory=dict)
    """By part: prompt; chosen and rejected of pairs; desirable and undesirable labelled answers; answers not judged"""
    prompt_token_share: float = 0.0  # prompt tokens / all tokens, each prompt and answer counted once per group
    groups: int = 0  # of the pairs kept; 0: not known
    desirable: int = 0
    """Of the pairs kept, labelled answers: a pair of itself each"""
    undesirable: int = 0
    rows: int = 0
    """0: not known"""

    def __post_init__(self) -> None:
        self.rows_read = self.rows_read or [0] * len(self.sources)
        self.pairs_kept = self.pairs_kept or [0] * len(self.sources)

    @property
    def malformed_rows(self) -> int:
        """Rows that are broken: bad JSON, a missing column, a wrong type."""
        return sum(problem.count for problem in self.problems if ProblemKind[problem.kind].malformed)

    @property
    def dropped_rows(self) -> int:
        """Rows that gave no pair, for whatever reason."""
        return sum(problem.count for problem in self.problems)

    @property
    def malformed_share(self) -> float:
        """Share of the rows read that are broken."""
        return self.malformed_rows / max(1, sum(self.rows_read))

    @property
    def dropped_share(self) -> float:
        """Share of the rows read that gave no pair."""
        return self.dropped_rows / max(1, sum(self.rows_read))

    @property
    def counted(self) -> str:
        """What `rows_read` counts, for messages."""
        if _ANSWER in self.tokens:
            return "answers"
        return "pairs" if 0 < self.rows < sum(self.rows_read) else "rows"

    def add(self, source: int, pairs: int, outcome: Outcome) -> None:
        """Count the rows of a source that follow those before."""
        self.rows += outcome.rows
        self.rows_read[source] += outcome.read
        self.pairs_kept[source] += pairs
        self.desirable += outcome.desirable
        self.undesirable += outcome.undesirable
        self.truncated_prompts += outcome.truncated_prompts
        self.truncated_responses += outcome.truncated_responses
        for name, count in outcome.unread.items():
            self.unread[name] = self.unread.get(name, 0) + count
        for token, (count, *rows) in outcome.spelled_out.items():
            of_token = next((each for each in self.spelled_out if (each.token, each.source) == (token, source)), None)
            if of_token is None:
                self.spelled_out.append(SpelledOut(token, source, count, rows))
            else:
                of_token.count += count
                of_token.rows = first_rows(of_token.rows, rows)
        for new in outcome.problems.values():
            known = next((each for each in self.problems if (each.kind, each.source) == (new.kind, source)), None)
            if known is None:
                self.problems.append(ProblemCount(**dataclasses.asdict(new), source=source))
            else:
                known.count += new.count
                known.rows = first_rows(known.rows, new.rows)

    def set_lengths(
        self, lengths: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], label: npt.NDArray[np.int8]
    ) -> None:
        """Fill in the token statistics from the kept pairs.

        Args:
            lengths, starts: [P, 3] of prompt, chosen, rejected.
            label: [P] of labelled answers; -1: a pair.
        """
        prompt, chosen, rejected = lengths.T
        parts = {"prompt": prompt, "chosen": chosen[label == PAIR], "rejected": rejected[label == PAIR]}
        parts |= {"desirable": chosen[label == DESIRABLE], "undesirable": chosen[label == UNDESIRABLE]}
        parts |= {_ANSWER: chosen[label == UNJUDGED]}
        for part, column in parts.items():
            if len(column):
                p50, p95 = np.percentile(column, (50, 95))
                self.tokens[part] = LengthStats(float(column.mean()), float(p50), float(p95), int(column.max()))
        first = first_pairs(starts)
        self.groups = len(first)
        self.prompt_token_share = float(lengths[first, 0].sum(dtype=np.int64) / (starts + lengths).max())

    def format(self) -> str:
        """The report as text, at most 20 lines."""
        return plain(self.blocks())

    def blocks(self) -> list[Block]:
        """The same to be shown."""
        read, kept = sum(self.rows_read), sum(self.pairs_kept)
        groups = f" in {self.groups:,} groups" if 0 < self.groups < kept else ""
        dropped = f"({self.dropped_rows:,} dropped, {self.dropped_share:.2%})"
        labelled = self.desirable + self.undesirable
        what = "answers" if _ANSWER in self.tokens else "pairs"
        if labelled:
            what = "labelled answers" if labelled == kept else "pairs and labelled answers"
        of_rows = f" of {self.rows:,} rows" if self.counted == "pairs" else ""
        lines = [f"{what}: {kept:,}{groups} kept of {read:,} {self.counted}{of_rows} {dropped}"]
        if labelled:
            lines.append(f"  {self._describe_labels()}")
        if len(self.sources) > 1:
            per_source = zip(self.sources, self.pairs_kept, self.rows_read, strict=True)
            lines += _at_most(4, [f"  {name}: {pairs:,} of {rows:,}" for name, pairs, rows in per_source])
        problems = sorted(self.problems, key=lambda problem: -problem.count)
        room = _MAX_LINES - len(lines) - max(3, len(self.tokens)) - 2 - bool(self.unread) - bool(self.spelled_out)
        lines += _at_most(room, [_describe(problem, self.sources) for problem in problems])
        if self.unread:
            lines.append(_not_read(self.unread))
        if self.spelled_out:
            lines.append(_spelled(self.spelled_out, self.sources))
        blocks: list[Block] = ["\n".join(lines)]
        if self.tokens:
            rows = [
                [part, f"{stats.mean:.1f}", f"{stats.p50:.0f}", f"{stats.p95:.0f}", f"{stats.max:,}"]
                for part, stats in self.tokens.items()
            ]
            blocks.append(Table(["tokens", "mean", "median", "95 %", "max"], rows, gap=3))
            blocks.append(
                f"prompts are {self.prompt_token_share:.1%} of the tokens; truncated: {self.truncated_prompts:,} "
                f"prompts, {self.truncated_responses:,} responses"
            )
        return blocks

    def _describe_labels(self) -> str:
        labelled = self.desirable + self.undesirable
        share = self.desirable / labelled
        told = f"{self.desirable:,} desirable ({share:.1%}), {self.undesirable:,} undesirable ({1 - share:.1%})"
        pairs = sum(self.pairs_kept) - labelled
        return f"{pairs:,} pairs, {labelled:,} labelled answers: {told}" if pairs else told

    def to_json(self) -> dict[str, Any]:
        """The report as an object for `json.dump`; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DataReport:
        """Inverse of `to_json`.

        Raises:
            ValueError: it is no report.
        """
        younger = ("groups", "desirable", "undesirable", "rows")
        fields = {"spelled_out": [], **dict.fromkeys(younger, 0), **fields}
        if wrong := schema_error(fields, _SHAPE):
            raise ValueError(f"in its report, {wrong}")
        sources = len(fields["sources"])
        if any(len(fields[name]) != sources for name in ("rows_read", "pairs_kept")):
            raise ValueError("its report counts the rows of other sources")
        if any(problem["source"] >= sources or not problem["rows"] for problem in fields["problems"]):
            raise ValueError("its report has problems of no source or row")
        problems = [_only_fields(ProblemCount, problem) for problem in fields["problems"]]
        if any(each["source"] >= sources or not each["rows"] for each in fields["spelled_out"]):
            raise ValueError("its report has control tokens of no source or row")
        spelled_out = [_only_fields(SpelledOut, each) for each in fields["spelled_out"]]
        tokens = {part: _only_fields(LengthStats, stats) for part, stats in fields["tokens"].items()}
        return _only_fields(cls, {**fields, "problems": problems, "spelled_out": spelled_out, "tokens": tokens})


def _only_fields[Read](kind: type[Read], values: dict[str, Any]) -> Read:
    """The dataclass of those values that it has."""
    return kind(**{each.name: values[each.name] for each in dataclasses.fields(kind)})  # type: ignore[arg-type]


_SHAPE = {
    "sources": [str],
    "rows_read": [is_count],
    "pairs_kept": [is_count],
    "problems": [
        {
            "kind": lambda name: isinstance(name, str) and name in ProblemKind.__members__,
            "source": is_count,
            "count": is_count,
            "rows": [is_count],
            "detail": str,
        }
    ],
    "unread": Each(is_count),
    "spelled_out": [{"token": str, "source": is_count, "count": is_count, "rows": [is_count]}],
    "truncated_prompts": is_count,
    "truncated_responses": is_count,
    "tokens": Each({"mean": is_number, "p50": is_number, "p95": is_number, "max": is_count}),
    "prompt_token_share": is_number,
    "groups": is_count,
    "desirable": is_count,
    "undesirable": is_count,
    "rows": is_count,
}


def _describe(problem: ProblemCount, sources: Sequence[str]) -> str:
    where = f" of {sources[problem.source]}" if len(sources) > 1 else ""
    rows = _listed(problem.rows, problem.count)
    kind = ProblemKind[problem.kind]
    return f"  {problem.count:,} {'malformed' if kind.malformed else 'unusable'}: {kind.value} (row {rows}{where})"


def _listed(first: list[int], count: int) -> str:
    """Numbers of rows; fewer than could be shown are all, for a row counts as often as it gives pairs."""
    return ", ".join(map(str, first)) + (", ..." if count > len(first) == MAX_EXAMPLES else "")


def _not_read(unread: Mapping[str, int]) -> str:
    names = sorted(unread, key=lambda name: (-unread[name], name))
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"  not read: {', '.join(printable(name, 60) for name in names[:_MAX_NAMES])}{more}"


def _spelled(found: Sequence[SpelledOut], sources: Sequence[str]) -> str:
    """The commonest, in a line."""
    ordered = sorted(found, key=lambda each: (-each.count, each.token))
    told = []
    for each in ordered[:_MAX_SPELLED]:
        where = f" of {sources[each.source]}" if len(sources) > 1 else ""
        rows = _listed(each.rows, each.count)
        told.append(f"{printable(each.token, 40)} in {each.count:,} (row {rows}{where})")
    more = f" and {len(ordered) - _MAX_SPELLED} more" if len(ordered) > _MAX_SPELLED else ""
    return f"  control tokens in texts, taken as such: {', '.join(told)}{more}"


def _at_most(count: int, lines: Sequence[str]) -> list[str]:
    """The first lines, and one that says how many are left out."""
    if len(lines) <= count:
        return list(lines)
    return [*lines[: count - 1], f"  ... and {len(lines) - count + 1} more"]
