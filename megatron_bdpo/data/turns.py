"""A record as texts, and where the assistant speaks in an answer of several turns."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_bdpo.data.chat_template import ChatTemplate, Spans
from megatron_bdpo.data.messages import ASSISTANT, Message
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import ASSISTANT_MARKER, USER_MARKER, PreferenceRecord


class Rendered(NamedTuple):
    """A prompt and a response as one text. Only ``spans`` of the response are scored; None: all of it."""

    text: str
    spans: Spans | None = None


def render_strings(record: PreferenceRecord) -> tuple[str, list[Rendered]]:
    """Texts of the prompt and of the prompt with each of ``record.answers``."""
    assert isinstance(record.prompt, str)
    start, rendered = len(record.prompt), []
    for response in record.answers.values():
        assert isinstance(response, str)
        spans = _dialogue_spans(response, start) if record.is_dialogue else None
        rendered.append(Rendered(record.prompt + response, spans))
    return record.prompt, rendered


_TURN = re.compile(f"{USER_MARKER}.*?(?:{ASSISTANT_MARKER}|$)", re.DOTALL)


def _dialogue_spans(response: str, start: int) -> Spans | None:
    """Where the assistant speaks in the rest of a plain-text dialogue; None: everywhere."""
    users = [match.span() for match in _TURN.finditer(response)]
    if not users:
        return None
    ends, starts = zip(*users, strict=True)
    bounds = zip((0, *starts), (*ends, len(response)), strict=True)
    return [(start + begin, start + end) for begin, end in bounds if end > begin]


def render_chat(template: ChatTemplate, record: PreferenceRecord) -> tuple[str, list[Rendered]]:
    """Texts of the prompt and of the whole conversation with each answer: rules 4 and 6 of ``tokenization``.

    Raises:
        RowProblem: the template writes something else where the response begins, or between its turns.
    """
    assert isinstance(record.prompt, list)
    responses = {name: response for name, response in record.answers.items() if isinstance(response, list)}
    opened = all(response[0]["role"] == ASSISTANT for response in responses.values())
    prompt = template.apply(record.prompt, record.variables, add_generation_prompt=opened)
    texts = []
    for name, response in responses.items():
        text = template.apply(record.prompt + response, record.variables, add_generation_prompt=False)
        if not text.startswith(prompt):
            raise RowProblem(
                ProblemKind.TEMPLATE_MISMATCH,
                f"the rendered prompt ends with {prompt[-40:]!r}, but with the response of {name} the template "
                f"writes {text[max(0, len(prompt) - 40) : len(prompt)]!r} there",
            )
        spans = None if len(response) == 1 else _spans(template, record, response, text, len(prompt), name)
        texts.append(Rendered(text, spans))
    return prompt, texts


def _spans(
    template: ChatTemplate, record: PreferenceRecord, response: list[Message], text: str, prompt_ends: int, name: str
) -> Spans:
    """Where the assistant speaks in a response of several turns."""
    assert isinstance(record.prompt, list)
    marked = template.marked_spans(record.prompt + response, record.variables)
    if marked is None:
        return _spans_by_turn(template, record, response, text, name)
    return [(max(start, prompt_ends), end) for start, end in marked if end > prompt_ends]


def _spans_by_turn(
    template: ChatTemplate, record: PreferenceRecord, response: list[Message], text: str, name: str
) -> Spans:
    """What comes between the text before a turn, opened for the assistant, and the text with it."""
    assert isinstance(record.prompt, list)
    conversation, spans = record.prompt + response, []
    for index in range(len(record.prompt), len(conversation)):
        if conversation[index]["role"] != ASSISTANT:
            continue
        before = template.apply(conversation[:index], record.variables, add_generation_prompt=True)
        if not text.startswith(before):
            raise RowProblem(
                ProblemKind.TEMPLATE_MISMATCH,
                f"where turn {index + 1} of {name} begins, the template writes {before[-40:]!r} if it is the last, "
                f"and {text[max(0, len(before) - 40) : len(before)]!r} if the conversation goes on",
            )
        spans.append((len(before), _end_of_turn(template, record, conversation, index, text, len(before), name)))
    return spans


def _end_of_turn(
    template: ChatTemplate,
    record: PreferenceRecord,
    conversation: list[Message],
    index: int,
    text: str,
    start: int,
    name: str,
) -> int:
    if index == len(conversation) - 1:
        return len(text)
    upto = template.apply(conversation[: index + 1], record.variables, add_generation_prompt=False)
    if len(upto) > start and text.startswith(upto):
        return len(upto)
    # Some templates write a turn in another way once it is not the last: its reasoning is left out, for one. Then
    # it goes to the first end of a turn.
    after = template.short_conversation[1]
    mark = after.strip()
    at = text.find(mark, start) if mark else -1
    if at < 0:
        raise RowProblem(
            ProblemKind.TEMPLATE_MISMATCH, f"the template does not show where turn {index + 1} of {name} ends"
        )
    space = after[len(after.rstrip()) :]
    end = at + len(mark)
    return end + len(space) if text.startswith(space, end) else end
