"""What can be wrong with a row: the kinds, which are counted, and one row's own detail."""

from __future__ import annotations

import enum


class ProblemKind(enum.Enum):
    """Why a row gives no pair. The value is the text of the report."""

    # Malformed: the file is not what it claims to be. Tolerated only as far as the user says so.
    BAD_JSON = "bad JSON"
    MISSING_COLUMN = "missing column"
    WRONG_TYPE = "wrong type"
    # Unusable: well-formed, but nothing to learn from or no way to train on it faithfully.
    EMPTY_RESPONSE = "empty response"
    IDENTICAL_RESPONSES = "identical responses"
    IDENTICAL_TOKENS = "responses identical once tokenized"
    IDENTICAL_AFTER_TRUNCATION = "responses identical after truncation"
    TIED = "answers with the same score or rank"
    UNRANKED = "fewer than two answers with a score or rank"
    NO_COMMON_PROMPT = "no common prompt"
    NO_ASSISTANT_TURN = "response does not end with the assistant's turn"
    BOUNDARY_MERGE = "tokens merge across the prompt boundary"
    TEMPLATE_MISMATCH = "chat template does not keep the prompt as a prefix"
    TEMPLATE_REFUSED = "chat template refuses the conversation"
    CONTROL_TOKENS = "texts spell out control tokens"
    NOT_ENCODABLE = "tokenizer cannot encode the text"

    @property
    def malformed(self) -> bool:
        """True for rows that are broken, False for rows that are sound but cannot be used."""
        return self in _MALFORMED


_LONGEST_DETAIL = 500

_MALFORMED = frozenset({ProblemKind.BAD_JSON, ProblemKind.MISSING_COLUMN, ProblemKind.WRONG_TYPE})


class RowProblem(Exception):
    """One row that gives no pair: its kind, which is counted, and a detail, which is shown for the first such row.

    What the row itself brings into the detail may be anything: it is made fit for a terminal.
    """

    def __init__(self, kind: ProblemKind, detail: str) -> None:
        self.kind = kind
        self.detail = printable(detail, _LONGEST_DETAIL)
        super().__init__(f"{kind.value}: {self.detail}")

    def __reduce__(self) -> tuple[type[RowProblem], tuple[ProblemKind, str]]:
        return RowProblem, (self.kind, self.detail)  # it comes from worker processes


def printable(text: str, longest: int) -> str:
    """The text on one line, cut to a length, with escapes for what a terminal cannot show or would obey."""
    shown = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
