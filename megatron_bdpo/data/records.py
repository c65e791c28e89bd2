"""One raw row to one preference record: which column is what, and where the prompt ends.

Four forms of a row are read:

====================  =======================  ==========================================================
form                  ``prompt``               ``chosen`` / ``rejected``
====================  =======================  ==========================================================
strings               string                   strings
implicit strings      absent                   whole dialogues, ``"\\n\\nHuman: ...\\n\\nAssistant: ..."`` (HH-RLHF)
messages              messages or a string     a string, messages, or the whole conversation
implicit messages     absent                   whole conversations with a common beginning
====================  =======================  ==========================================================

Everything that both answers begin with belongs to the prompt; what follows is the answer, of one turn or of several.

A *labelled answer* is one answer that is known to be good or bad (KTO's thumbs up and down), in columns ``prompt``,
``completion`` and ``label`` (true or 1: desirable). Text needs the prompt. Messages may be the whole conversation, of
which the last turns of the assistant are the answer. ``ref_logps``, as TRL writes it, is its log-prob by a reference.

For what messages may hold, and the columns that go with them, see ``messages``. Optional columns ``chosen_safe`` and
``rejected_safe`` (true/false or 1/0; absent or null means unknown) carry safety labels, and ``ref_chosen_logps`` and
``ref_rejected_logps``, as TRL writes them, the log-probs of a reference; ``margin``, as TRL reads it, is by how much a
reward model should tell the answers apart; ``chosen_score`` and ``rejected_score`` are a judge's, the higher the
better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from megatron_bdpo.data.labels import UNJUDGED
from megatron_bdpo.data.messages import (
    ASSISTANT,
    USER,
    Message,
    as_unicode,
    parse_messages,
    says_something,
    template_variables,
)
from megatron_bdpo.data.problems import ProblemKind, RowProblem

# HH-RLHF writes dialogues as plain text; everything up to and including the last shared marker is the prompt.
ASSISTANT_MARKER = "\n\nAssistant:"
USER_MARKER = "\n\nHuman:"


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its two responses, either all strings or all chat messages; or one response with a label."""

    prompt: str | list[Message]
    """The text, or the messages before the response. The text may be empty, the messages may not."""
    chosen: str | list[Message]
    """The preferred response: text, or messages of which the last is the assistant's."""
    rejected: str | list[Message]
    """The dispreferred response, in the form of ``chosen``."""
    chosen_safe: bool | None = None
    """Safety label of ``chosen``; None when unknown."""
    rejected_safe: bool | None = None
    """Safety label of ``rejected``; None when unknown."""
    reference: tuple[float, float] | None = None
    """Log-probs of ``chosen`` and ``rejected`` by a reference, in nats; None when unknown."""
    margin: float | None = None
    """Of the rewards of ``chosen`` and ``rejected``, that a reward model should have at least; None: not asked for."""
    scores: tuple[float, float] | None = None
    """A judge's of ``chosen`` and ``rejected``, the higher the better; None when unknown."""
    label: int | None = None
    """Of a labelled answer, which ``chosen`` and ``rejected`` both are: see ``labels``. None: it is a pair."""
    is_dialogue: bool = False
    """Strings that may hold further turns, which HH-RLHF's markers tell apart."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What a chat template is given beside the messages: tools, documents and its own options."""

    @property
    def is_chat(self) -> bool:
        """True when the record is made of messages and needs a chat template."""
        return not isinstance(self.prompt, str)

    @property
    def answers(self) -> dict[str, str | list[Message]]:
        """Each by the name that messages give it."""
        if self.label is not None:
            return {COMPLETION: self.chosen}
        return {"chosen": self.chosen, "rejected": self.rejected}


COMPLETION, LABEL = "completion", "label"
#: In the place of a label, of an answer that nobody has judged. No file can hold it.
NO_LABEL: Final = object()


def is_labelled(row: Mapping[str, Any]) -> bool:
    """Whether the row is a labelled answer, whole or not: it has columns of one, and nothing in those of a pair."""
    return (COMPLETION in row or LABEL in row) and row.get("chosen") is None and row.get("rejected") is None


def parse_row(row: dict[str, Any]) -> PreferenceRecord:
    """Read one row of any of the forms in this module's docstring.

    Raises:
        RowProblem: the row is malformed or unusable.
    """
    return _parse_answer(row) if is_labelled(row) else _parse_pair(row)


def _parse_pair(row: dict[str, Any]) -> PreferenceRecord:
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
    _check_responses(chosen=parts[1], rejected=parts[2])
    return PreferenceRecord(
        *parts,
        chosen_safe=as_label(row.get("chosen_safe"), "column 'chosen_safe'"),
        rejected_safe=as_label(row.get("rejected_safe"), "column 'rejected_safe'"),
        reference=_reference(row),
        margin=_number(row, MARGIN_COLUMN),
        scores=_scores(row),
        is_dialogue=prompt is None and any(USER_MARKER in response for response in parts[1:]),
        variables={} if isinstance(parts[0], str) else template_variables(row),
    )


def _parse_answer(row: dict[str, Any]) -> PreferenceRecord:
    """A labelled answer, as a pair of itself."""
    prompt = _text_or_messages(row, "prompt") if row.get("prompt") is not None else None
    completion = _text_or_messages(row, COMPLETION)
    label = UNJUDGED if row.get(LABEL) is NO_LABEL else int(is_desirable(row, LABEL))
    if isinstance(completion, str):
        if prompt is None:
            raise _missing(row, "prompt")
        answer: str | list[Message] = completion
        if not isinstance(prompt, str):
            answer = [{"role": ASSISTANT, "content": completion}]
    else:
        prompt, answer = _split_conversation(prompt, completion)
    _check_responses(completion=answer)
    log_prob = row.get(ANSWER_REFERENCE)
    return PreferenceRecord(
        prompt,
        answer,
        answer,
        reference=None if log_prob is None else (as_log_prob(log_prob, f"column '{ANSWER_REFERENCE}'"),) * 2,
        label=label,
        variables={} if isinstance(prompt, str) else template_variables(row),
    )


def _split_conversation(
    prompt: str | list[Message] | None, completion: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Prompt and answer of a row whose completion is messages: the answer alone, or the conversation with it."""
    if isinstance(prompt, list):
        completion = _without_prompt(prompt, completion)
    elif prompt is not None and completion[0]["role"] != ASSISTANT:  # as UltraFeedback's: a user's turn once more
        if all((message["content"] or "").strip() != prompt.strip() for message in completion):
            raise RowProblem(ProblemKind.NO_COMMON_PROMPT, "the prompt column is no message of the conversation")
        prompt = None
    before = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt or []
    start = 0
    if completion[0]["role"] != ASSISTANT:  # what comes before the assistant's last turns is more of the prompt
        start = len(completion)
        while start and completion[start - 1]["role"] == ASSISTANT:
            start -= 1
    if not (before or start):
        raise RowProblem(ProblemKind.NO_COMMON_PROMPT, "the conversation has nothing before the assistant's answer")
    return before + completion[:start], completion[start:]


def is_desirable(row: Mapping[str, Any], column: str) -> bool:
    """The label of an answer: true or 1 says that it is desirable, false or 0 that it is not.

    Raises:
        RowProblem: it is something else, null or missing.
    """
    value = row.get(column)
    if value is None:
        raise _missing(row, column)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    needed = "true or 1 (a desirable answer), false or 0 (an undesirable one)"
    raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{column}' is {value!r}; {needed} is needed")


def _check_responses(**responses: str | list[Message]) -> None:
    for name, response in responses.items():
        if isinstance(response, str):
            if not response.strip():
                raise RowProblem(ProblemKind.EMPTY_RESPONSE, f"{name} has no text")
        elif not response or response[-1]["role"] != ASSISTANT:
            roles = ", ".join(message["role"] for message in response) or "nothing"
            raise RowProblem(
                ProblemKind.NO_ASSISTANT_TURN,
                f"after the prompt, {name} holds {roles}; its last message has to be the {ASSISTANT}'s",
            )
        elif not says_something(response[-1]):
            raise RowProblem(ProblemKind.EMPTY_RESPONSE, f"{name} has no text")


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
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _from_messages(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and responses of a row whose chosen and rejected columns are messages."""
    shared: list[Message] = []
    # UltraFeedback's form: the prompt column repeats, as a string, a user turn of the two conversations.
    repeats = isinstance(prompt, str) and len(chosen) > 1 and len(rejected) > 1
    if prompt is not None and not repeats:
        shared = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
        chosen, rejected = _without_prompt(shared, chosen), _without_prompt(shared, rejected)
    common = _common_length(chosen, rejected)
    shared, chosen, rejected = shared + chosen[:common], chosen[common:], rejected[common:]
    if not shared:
        raise RowProblem(
            ProblemKind.NO_COMMON_PROMPT, "the conversations differ in their first message, or one ends with it"
        )
    if repeats and all((message["content"] or "").strip() != str(prompt).strip() for message in shared):
        raise RowProblem(
            ProblemKind.NO_COMMON_PROMPT, "the prompt column is none of the messages that both conversations share"
        )
    return shared, chosen, rejected


def _common_length(first: list[Message], second: list[Message]) -> int:
    """Number of messages that both conversations begin with, of which one is left to each as its answer."""
    at_most = max(0, min(len(first), len(second)) - 1)
    pairs = zip(first[:at_most], second[:at_most], strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), at_most)


def _without_prompt(prompt: list[Message], response: list[Message]) -> list[Message]:
    """The response alone, whether the column repeats the prompt's messages or not."""
    repeats = len(response) > len(prompt) and response[: len(prompt)] == prompt
    return response[len(prompt) :] if repeats else response


def _text_or_messages(row: dict[str, Any], column: str) -> str | list[Message]:
    """The column's value, checked: a string, or a non-empty list of messages."""
    value = row.get(column)
    if value is None:
        raise _missing(row, column)
    if isinstance(value, str):
        return as_unicode(value, column)
    if isinstance(value, list):
        return parse_messages(value, column)
    raise RowProblem(
        ProblemKind.WRONG_TYPE, f"column '{column}' is {type(value).__name__}; a string or a list of messages is needed"
    )


def _missing(row: Mapping[str, Any], column: str) -> RowProblem:
    held = "is null" if column in row else f"is missing; the row has {', '.join(sorted(row)) or 'no columns'}"
    return RowProblem(ProblemKind.MISSING_COLUMN, f"column '{column}' {held}")


def as_label(value: Any, where: str) -> bool | None:
    """A safety label: true/false or 1/0; None when it is absent or null.

    Raises:
        RowProblem: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is {value!r}; true, false, 1, 0 or null is needed")


MARGIN_COLUMN = "margin"
SCORE_COLUMNS = ("chosen_score", "rejected_score")


def _number(row: dict[str, Any], column: str) -> float | None:
    """A finite number; None when the column is absent or null."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{column}' is {value!r}; a finite number is needed")
    return float(value)


def is_finite(value: float) -> bool:
    """Whether it is a float's number; integers of JSON may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _scores(row: dict[str, Any]) -> tuple[float, float] | None:
    """Both scores; None when a column is absent or null."""
    chosen, rejected = (_number(row, column) for column in SCORE_COLUMNS)
    return None if chosen is None or rejected is None else (chosen, rejected)


REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
#: Of a labelled answer.
ANSWER_REFERENCE = "ref_logps"


def _reference(row: dict[str, Any]) -> tuple[float, float] | None:
    """Both log-probs; None when both columns are absent or null."""
    if all(row.get(column) is None for column in REFERENCE_COLUMNS):
        return None
    chosen, rejected = (as_log_prob(row.get(column), f"column '{column}'") for column in REFERENCE_COLUMNS)
    return chosen, rejected


def as_log_prob(value: Any, where: str) -> float:
    """In nats.

    Raises:
        RowProblem: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (is_finite(value) and value <= 0):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is {value!r}; a log-prob is needed, 0 or less")
    return float(value)
