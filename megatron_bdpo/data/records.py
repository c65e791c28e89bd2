"""One raw row to one preference record: which column is what, and where the prompt ends.

Four forms of a row are read:

====================  =======================  ==========================================================
form                  ``prompt``               ``chosen`` / ``rejected``
====================  =======================  ==========================================================
strings               string                   strings
implicit strings      absent                   whole dialogues, ``"\\n\\nHuman: ...\\n\\nAssistant: ..."`` (HH-RLHF)
messages              messages or a string     a string, one assistant message, or the whole conversation
implicit messages     absent                   whole conversations with a common beginning
====================  =======================  ==========================================================

A message is ``{"role": str, "content": str}``. Optional columns ``chosen_safe`` and ``rejected_safe`` (true/false or
1/0; absent or null means unknown) carry safety labels.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

type Message = dict[str, str]

ASSISTANT = "assistant"
USER = "user"

# HH-RLHF writes dialogues as plain text; everything up to and including the last shared marker is the prompt.
ASSISTANT_MARKER = "\n\nAssistant:"


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
    DIVERGES_EARLY = "dialogues differ before the last assistant turn"
    NOT_ONE_ASSISTANT_TURN = "response is not one assistant turn"
    BOUNDARY_MERGE = "tokens merge across the prompt boundary"
    TEMPLATE_MISMATCH = "chat template does not keep the prompt as a prefix"
    TEMPLATE_REFUSED = "chat template refuses the conversation"
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
        detail = printable(detail, _LONGEST_DETAIL)
        super().__init__(f"{kind.value}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its two responses, either all strings or all chat messages.

    Attributes:
        prompt: the text, or the messages before the response. The text may be empty, the messages may not.
        chosen: the preferred response: text, or a list of one assistant message.
        rejected: the dispreferred response, in the form of ``chosen``.
        chosen_safe: safety label of ``chosen``; None when unknown.
        rejected_safe: safety label of ``rejected``; None when unknown.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None

    @property
    def is_chat(self) -> bool:
        """True when the record is made of messages and needs a chat template."""
        return not isinstance(self.prompt, str)


def parse_row(row: dict[str, Any]) -> PreferenceRecord:
    """Read one row of any of the forms in this module's docstring.

    Raises:
        RowProblem: the row is malformed or unusable.
    """
    prompt = _text_or_messages(row, "prompt") if row.get("prompt") is not None else None
    chosen = _text_or_messages(row, "chosen")
    rejected = _text_or_messages(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem(
            ProblemKind.WRONG_TYPE, "chosen and rejected must both be strings or both be lists of messages"
        )
    if chosen == rejected:
        raise RowProblem(ProblemKind.IDENTICAL_RESPONSES, "chosen and rejected are the same")
    if isinstance(chosen, str) and isinstance(rejected, str):
        parts = _from_strings(prompt, chosen, rejected)
    else:
        assert isinstance(chosen, list) and isinstance(rejected, list)
        parts = _from_messages(prompt, chosen, rejected)
    if parts[1] == parts[2]:  # of two columns of which one repeats the prompt
        raise RowProblem(ProblemKind.IDENTICAL_RESPONSES, "after the prompt, chosen and rejected are the same")
    for name, response in zip(("chosen", "rejected"), parts[1:], strict=True):
        text = response if isinstance(response, str) else response[-1]["content"]
        if not text.strip():
            raise RowProblem(ProblemKind.EMPTY_RESPONSE, f"{name} has no text")
    return PreferenceRecord(*parts, chosen_safe=_label(row, "chosen_safe"), rejected_safe=_label(row, "rejected_safe"))


def parse_prompt(row: dict[str, Any]) -> str | list[Message]:
    """Read the prompt of a row that needs no responses: text, or chat messages.

    Raises:
        RowProblem: the row is malformed.
    """
    return _text_or_messages(row, "prompt")


type _Parts = tuple[str | list[Message], str | list[Message], str | list[Message]]


def _from_strings(prompt: str | list[Message] | None, chosen: str, rejected: str) -> _Parts:
    """Prompt and responses of a row whose chosen and rejected columns are strings."""
    if prompt is None:
        return _split_dialogue(chosen, rejected)
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    return prompt, [{"role": ASSISTANT, "content": chosen}], [{"role": ASSISTANT, "content": rejected}]


def _split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two plain-text dialogues at the last assistant marker that lies in their common beginning."""
    if ASSISTANT_MARKER not in chosen or ASSISTANT_MARKER not in rejected:
        raise RowProblem(
            ProblemKind.MISSING_COLUMN,
            f"there is no 'prompt' column, and chosen and rejected are not both dialogues with {ASSISTANT_MARKER!r} "
            "markers, so it is unknown where the prompt ends: add a 'prompt' column",
        )
    cut = 0
    while (marker_at := chosen.find(ASSISTANT_MARKER, cut)) >= 0:
        end = marker_at + len(ASSISTANT_MARKER)
        if not rejected.startswith(chosen[cut:end], cut):
            break
        cut = end
    if cut == 0:
        raise RowProblem(ProblemKind.NO_COMMON_PROMPT, f"the dialogues differ before the first {ASSISTANT_MARKER!r}")
    # A later marker means that the dialogues part ways in an earlier turn: what follows contains the user's words.
    if ASSISTANT_MARKER in chosen[cut:] or ASSISTANT_MARKER in rejected[cut:]:
        raise RowProblem(
            ProblemKind.DIVERGES_EARLY, f"the dialogues differ after character {cut}, and more assistant turns follow"
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _from_messages(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and responses of a row whose chosen and rejected columns are messages."""
    if prompt is None or (isinstance(prompt, str) and len(chosen) > 1 and len(rejected) > 1):
        common = _common_length(chosen, rejected)
        shared = chosen[:common]
        # UltraFeedback's form: the prompt column repeats, as a string, a user turn of the two conversations.
        if prompt is not None and all(message["content"].strip() != prompt.strip() for message in shared):
            raise RowProblem(
                ProblemKind.NO_COMMON_PROMPT, "the prompt column is none of the messages that both conversations share"
            )
        chosen, rejected = chosen[common:], rejected[common:]
        if not shared:
            raise RowProblem(ProblemKind.NO_COMMON_PROMPT, "the conversations differ in their first message")
        if len(chosen) != 1 or len(rejected) != 1:
            raise RowProblem(ProblemKind.DIVERGES_EARLY, f"the conversations differ from message {common + 1} on")
    else:
        shared = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
        chosen, rejected = _without_prompt(shared, chosen), _without_prompt(shared, rejected)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if len(response) != 1 or response[0]["role"] != ASSISTANT:
            roles = ", ".join(message["role"] for message in response) or "nothing"
            raise RowProblem(
                ProblemKind.NOT_ONE_ASSISTANT_TURN,
                f"after the prompt, {name} holds {roles}; one {ASSISTANT} message is needed",
            )
    return shared, chosen, rejected


def _common_length(first: list[Message], second: list[Message]) -> int:
    """Number of messages that both conversations begin with."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _without_prompt(prompt: list[Message], response: list[Message]) -> list[Message]:
    """The response alone, whether the column repeats the prompt's messages or not."""
    repeats = len(response) > len(prompt) and response[: len(prompt)] == prompt
    return response[len(prompt) :] if repeats else response


def _text_or_messages(row: dict[str, Any], column: str) -> str | list[Message]:
    """The column's value, checked: a string, or a non-empty list of messages reduced to role and content."""
    value = row.get(column)
    if value is None:
        held = "is null" if column in row else f"is missing; the row has {', '.join(sorted(row)) or 'no columns'}"
        raise RowProblem(ProblemKind.MISSING_COLUMN, f"column '{column}' {held}")
    if isinstance(value, str):
        return _unicode(value, column)
    if isinstance(value, list):
        if not value:
            raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{column}' is an empty list of messages")
        return [_message(message, f"column '{column}', message {i}") for i, message in enumerate(value, start=1)]
    raise RowProblem(
        ProblemKind.WRONG_TYPE, f"column '{column}' is {type(value).__name__}; a string or a list of messages is needed"
    )


def _message(value: Any, where: str) -> Message:
    """One message with its role and content; other fields are dropped, except those that would change the text."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is not an object with a 'role' and a 'content'")
    if not isinstance(value.get("content"), str):
        found = type(value.get("content")).__name__
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where}: content is {found}; only text is supported")
    if value.get("tool_calls"):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where}: tool_calls are not supported")
    return {"role": _unicode(value["role"], where), "content": _unicode(value["content"], where)}


def _unicode(text: str, where: str) -> str:
    """The text itself; JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is not valid Unicode: {error.reason}") from error
    return text


def printable(text: str, longest: int) -> str:
    """The text on one line, cut to a length, with escapes for what a terminal cannot show or would obey."""
    shown = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _label(row: dict[str, Any], column: str) -> bool | None:
    """A safety label: true/false or 1/0; None when the column is absent or null."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{column}' is {value!r}; true, false, 1, 0 or null is needed")
