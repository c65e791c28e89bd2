"""What becomes of some rows of one source: the pairs' tokens in a few arrays, and why the other rows gave none.

It is what a tokenizing process sends back, what is kept of a data set that is not finished, and what stores are made
of. Shapes: N tokens, P pairs, S stretches of context, E tokens and D number of unconditional prompts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_bdpo.data.labels import DESIRABLE, PAIR, UNDESIRABLE
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.tokenization import BoolArray, PairTokens, TokenArray

UNKNOWN, SAFE, UNSAFE = -1, 0, 1
CHATS, STRINGS = "chat messages", "strings"
MAX_EXAMPLES = 3
_MOST_NAMES = 100


def first_rows(known: list[int], new: list[int]) -> list[int]:
    """The first few numbers of rows, each once: a row counts as often as it gives pairs."""
    return list(dict.fromkeys(known + new))[:MAX_EXAMPLES]


@dataclass
class Problem:
    """How often one kind of problem came up."""

    kind: str
    """Name of the `ProblemKind`."""
    count: int
    rows: list[int]
    """Numbers of the first few rows."""
    detail: str
    """What was wrong with the first."""


@dataclass
class Outcome:
    """Counts over rows: ``read`` is pairs kept plus the counts of ``problems``."""

    read: int = 0
    """Pairs, or rows that give none."""
    rows: int = 0
    desirable: int = 0
    """Of the pairs kept, labelled answers"""
    undesirable: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    """Columns and fields that nothing reads -> rows that have them."""
    spelled_out: dict[str, list[int]] = field(default_factory=dict)
    """Control tokens in texts, which become real ones -> how many pairs have them, and rows of the first few."""
    forms: dict[str, int] = field(default_factory=dict)
    """``CHATS`` and ``STRINGS`` -> the first row of that form that gave a pair."""

    def add_read(self, place: int) -> None:
        """Count what a row gives, or that it gives nothing; ``place`` is 0 at the first of a row."""
        self.read += 1
        self.rows += place == 0

    def add_problem(self, row: int, kind: ProblemKind, detail: str) -> None:
        """Count one row that gives no pair."""
        problem = self.problems.setdefault(kind.name, Problem(kind.name, 0, [], detail))
        problem.count += 1
        problem.rows = first_rows(problem.rows, [row])

    def add_unread(self, names: Iterable[str], rows: int = 1) -> None:
        """Count columns and fields that nothing reads; where rows name ever new ones, only the first many by name."""
        for name in names:
            known = name if name in self.unread or len(self.unread) < _MOST_NAMES else "others"
            self.unread[known] = self.unread.get(known, 0) + rows

    def add_label(self, label: int | None) -> None:
        """Count what is kept of a row; None: a pair, which has none."""
        self.desirable += label == DESIRABLE
        self.undesirable += label == UNDESIRABLE

    def add_spelled_out(self, token: str, pairs: int, rows: list[int]) -> None:
        """Count pairs whose texts spell out a control token."""
        count, *first = self.spelled_out.get(token, [0])
        self.spelled_out[token] = [count + pairs, *first_rows(first, rows)]

    def add(self, other: Outcome) -> None:
        """Count the rows that follow."""
        self.read += other.read
        self.rows += other.rows
        self.desirable += other.desirable
        self.undesirable += other.undesirable
        self.truncated_prompts += other.truncated_prompts
        self.truncated_responses += other.truncated_responses
        for name, problem in other.problems.items():
            known = self.problems.setdefault(name, Problem(name, 0, [], problem.detail))
            known.count += problem.count
            known.rows = first_rows(known.rows, problem.rows)
        for name, count in other.unread.items():
            self.add_unread([name], count)
        for token, (pairs, *rows) in other.spelled_out.items():
            self.add_spelled_out(token, pairs, rows)
        for name, row in other.forms.items():
            self.forms.setdefault(name, row)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Outcome:
        """Inverse of ``dataclasses.asdict``, after a way through JSON."""
        problems = {name: Problem(**problem) for name, problem in fields["problems"].items()}
        return cls(**{**fields, "problems": problems})


@dataclass(frozen=True)
class TokenizedRows:
    """Pairs in the order of their rows, and the outcome of all the rows.

    A labelled answer is a pair whose chosen and rejected are one answer.
    """

    tokens: TokenArray
    """int32 [N] the prompts and answers, each group's together"""
    starts: npt.NDArray[np.int64]
    """int64 [P, 3] where prompt, chosen, rejected begin in ``tokens``; see ``RowsBuilder``"""
    lengths: npt.NDArray[np.int32]
    """int32 [P, 3] tokens of prompt, chosen, rejected"""
    row: npt.NDArray[np.int64]
    """int64 [P] row of the source, counted from 1"""
    unsafe: npt.NDArray[np.int8]
    """int8 [P, 2] safety of chosen, rejected: 0 safe, 1 unsafe, -1 unknown"""
    label: npt.NDArray[np.int8]
    """int8 [P] of labelled answers: see ``labels``; -1: a pair"""
    reference: npt.NDArray[np.float64]
    """float64 [P, 2] log-probs of chosen, rejected that the rows bring, in nats; NaN: none"""
    margin: npt.NDArray[np.float64]
    """float64 [P] margin of rewards that the rows ask for; NaN: none"""
    score: npt.NDArray[np.float64]
    """float64 [P, 2] a judge's of chosen, rejected, the higher the better; NaN: none"""
    context: npt.NDArray[np.int64]
    """int64 [S, 2] stretches of responses that are not scored, from and to an index of ``tokens``, in order"""
    prompt_of: npt.NDArray[np.int32]
    """int32 [P] index of the pair's own unconditional prompt; -1: the one that all share"""
    own_prompts: TokenArray
    """int32 [E] those prompts, one after the other"""
    own_lengths: npt.NDArray[np.int32]
    """int32 [D] tokens of each"""
    outcome: Outcome

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.lengths)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        outcome = np.frombuffer(json.dumps(dataclasses.asdict(self.outcome)).encode(), np.uint8)
        return save({"outcome": outcome, **{name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}})

    @classmethod
    def from_bytes(cls, content: bytes) -> TokenizedRows:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: it is something else, or not whole.
        """
        try:
            arrays = load(content)
            outcome = Outcome.from_json(json.loads(arrays["outcome"].tobytes()))
            return cls(**{name: arrays[name] for name in ARRAYS}, outcome=outcome)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


#: Names of the arrays.
ARRAYS = tuple(each.name for each in dataclasses.fields(TokenizedRows) if each.name != "outcome")


class RowsBuilder:
    """Collects the pairs and problems of rows that come one after the other.

    Pairs of one row with the same prompt that come one after the other are a group: they share its tokens, and those of
    the answers that they have in common. So pairs of one group have one start of their prompts, and lie beside each
    other.
    """

    def __init__(self) -> None:
        self.outcome = Outcome()
        self._tokens: list[TokenArray] = []
        self._used = 0
        self._group: tuple[Any, ...] = ()
        self._prompt_start = 0
        self._answers: dict[tuple[bytes, bytes | None], int] = {}
        self._starts: list[tuple[int, int, int]] = []
        self._lengths: list[tuple[int, int, int]] = []
        self._rows: list[int] = []
        self._unsafe: list[tuple[int, int]] = []
        self._label: list[int] = []
        self._reference: list[tuple[float, float]] = []
        self._margin: list[float] = []
        self._score: list[tuple[float, float]] = []
        self._context: list[tuple[int, int]] = []
        self._prompt_of: list[int] = []
        self._own: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Number of pairs so far."""
        return len(self._lengths)

    def append(
        self, pair: PairTokens, row: int, record: PreferenceRecord, own_prompt: TokenArray | None = None
    ) -> None:
        """Add one pair, or a labelled answer as a pair of itself.

        Of the record only labels, the reference's log-probs, margin and scores are kept.

        Args:
            own_prompt: the pair's unconditional prompt, where it is not the one that all share.
        """
        known = -1 if own_prompt is None else self._own.setdefault(own_prompt.tobytes(), len(self._own))
        group = (row, known, pair.prompt.tobytes())
        if group != self._group:
            self._group, self._answers = group, {}
            self._prompt_start = self._add(pair.prompt)
        first, second = (self._add_answer(*each) for each in zip(pair.parts[1:], pair.scored, strict=True))
        self._starts.append((self._prompt_start, first, second))
        self._lengths.append((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
        self._rows.append(row)
        self._unsafe.append((_safety(record.chosen_safe), _safety(record.rejected_safe)))
        self._label.append(PAIR if record.label is None else record.label)
        self._reference.append(record.reference or (math.nan, math.nan))
        self._margin.append(math.nan if record.margin is None else record.margin)
        self._score.append(record.scores or (math.nan, math.nan))
        self._prompt_of.append(known)
        self.outcome.add_label(record.label)
        self.outcome.forms.setdefault(CHATS if record.is_chat else STRINGS, row)

    def _add(self, tokens: TokenArray) -> int:
        """Where they begin."""
        start = self._used
        self._tokens.append(tokens)
        self._used += len(tokens)
        return start

    def _add_answer(self, tokens: TokenArray, scored: BoolArray | None) -> int:
        """Where it begins: once in a group."""
        key = tokens.tobytes(), None if scored is None else scored.tobytes()
        if key not in self._answers:
            self._answers[key] = start = self._add(tokens)
            if scored is not None:
                edges = np.flatnonzero(np.diff(np.concatenate([[True], scored, [True]]))) + start
                self._context += [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        return self._answers[key]

    def add_problem(self, row: int, problem: RowProblem) -> None:
        """Count one row that gives no pair."""
        self.outcome.add_problem(row, problem.kind, problem.detail)

    def finish(self) -> TokenizedRows:
        """All of it."""
        own = [np.frombuffer(content, np.int32) for content in self._own]
        return TokenizedRows(
            tokens=_joined(self._tokens),
            starts=np.array(self._starts, np.int64).reshape(-1, 3),
            lengths=np.array(self._lengths, np.int32).reshape(-1, 3),
            row=np.array(self._rows, np.int64),
            unsafe=np.array(self._unsafe, np.int8).reshape(-1, 2),
            label=np.array(self._label, np.int8),
            reference=np.array(self._reference, np.float64).reshape(-1, 2),
            margin=np.array(self._margin, np.float64),
            score=np.array(self._score, np.float64).reshape(-1, 2),
            context=np.array(self._context, np.int64).reshape(-1, 2),
            prompt_of=np.array(self._prompt_of, np.int32),
            own_prompts=_joined(own),
            own_lengths=np.array([len(prompt) for prompt in own], np.int32),
            outcome=self.outcome,
        )


def join(parts: Sequence[TokenizedRows]) -> TokenizedRows:
    """Rows that follow each other, as one."""
    outcome = Outcome()
    for part in parts:
        outcome.add(part.outcome)
    tokens = np.cumsum([0, *(len(part.tokens) for part in parts)])
    own = np.cumsum([0, *(len(part.own_lengths) for part in parts)])
    shifted = {
        "starts": [part.starts + start for part, start in zip(parts, tokens, strict=False)],
        "context": [part.context + start for part, start in zip(parts, tokens, strict=False)],
        "prompt_of": [
            np.where(part.prompt_of < 0, -1, part.prompt_of + start).astype(np.int32)
            for part, start in zip(parts, own, strict=False)
        ],
    }
    arrays = {name: np.concatenate(shifted.get(name, [getattr(part, name) for part in parts])) for name in ARRAYS}
    return TokenizedRows(**arrays, outcome=outcome)


def first_pairs(starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[G] the first pair of each group, of pairs whose parts begin at ``starts`` [P, 3]."""
    return np.flatnonzero(np.diff(starts[:, 0], prepend=-1))


def _joined(arrays: list[TokenArray]) -> TokenArray:
    return np.concatenate(arrays).astype(np.int32, copy=False) if arrays else np.zeros(0, np.int32)


def _safety(safe: bool | None) -> int:
    return UNKNOWN if safe is None else SAFE if safe else UNSAFE
