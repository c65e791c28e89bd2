"""Chat messages of a row, whole: whatever a chat template may read of them and of the row reaches it.

A message is an object with a ``role``; beside its ``content`` it may have ``tool_calls``, ``reasoning_content``,
``name``, ``tool_call_id`` and what else a template reads. Three things are brought into the form that templates take:

- content made of text parts, ``[{"type": "text", "text": ...}]``, becomes their text;
- arguments of tool calls that are JSON in a string, as OpenAI's API writes them, become the object;
- columns that may be JSON in a string (``tools``, ``documents``, ``chat_template_kwargs``) become what they spell.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_bdpo.data.problems import ProblemKind, RowProblem

type Message = dict[str, Any]

ASSISTANT = "assistant"
USER = "user"
SYSTEM_ROLES = ("system", "developer")

TOOLS, DOCUMENTS, TEMPLATE_KWARGS = "tools", "documents", "chat_template_kwargs"
#: Columns that a chat template reads beside the messages.
VARIABLES = (TOOLS, DOCUMENTS, TEMPLATE_KWARGS)

_PLAIN = {"role", "content"}

#: Fields of a message in which the assistant says something, beside its content.
_SAYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def parse_messages(value: list[Any], column: str) -> list[Message]:
    """The messages of a column, checked.

    Raises:
        RowProblem: it is no non-empty list of messages.
    """
    if not value:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{column}' is an empty list of messages")
    return [_message(message, f"column '{column}', message {i}") for i, message in enumerate(value, start=1)]


def says_something(message: Message) -> bool:
    """Whether there is something to learn from it: text, a tool call, reasoning."""
    return bool((message.get("content") or "").strip()) or any(message.get(field) for field in _SAYS)


def template_variables(row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside the messages: ``tools``, ``documents`` and the ``chat_template_kwargs``.

    Raises:
        RowProblem: a column does not hold what its name says.
    """
    found: dict[str, Any] = {}
    for column in (TOOLS, DOCUMENTS):
        if (value := _json_column(row, column)) is not None:
            items = [_from_json(item, f"column '{column}'") for item in value] if isinstance(value, list) else None
            if items is None or not all(isinstance(item, dict) for item in items):
                raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{column}' is not a list of objects")
            found[column] = items
    if not found.get(TOOLS, True):
        del found[TOOLS]  # an empty list is no tools, and a template might announce them
    named = _json_column(row, TEMPLATE_KWARGS)
    if named is not None:
        if not isinstance(named, dict):
            raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{TEMPLATE_KWARGS}' is not an object")
        if taken := sorted({*named} & {"messages", "conversation", "add_generation_prompt", "tokenize", *found}):
            raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{TEMPLATE_KWARGS}' may not hold {taken[0]!r}")
        found |= named
    return found


def as_unicode(text: str, where: str) -> str:
    """The text itself; JSON can spell half a surrogate pair, which no tokenizer takes.

    Raises:
        RowProblem: it holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is not valid Unicode: {error.reason}") from error
    return text


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is not an object with a 'role' and a 'content'")
    # Tables give every message the fields of all others, as nulls.
    message = {name: field for name, field in value.items() if field is not None}
    message["role"] = as_unicode(value["role"], where)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, where) for call in _listed(message["tool_calls"], where)]
    message["content"] = _content(value.get("content"), where, may_be_missing=any(map(message.get, _SAYS)))
    whole = message.keys() <= _PLAIN  # as nearly every message: spelling it out takes longer
    as_unicode(message["content"] or "" if whole else json.dumps(message, ensure_ascii=False, default=str), where)
    return message


def _content(content: Any, where: str, *, may_be_missing: bool) -> str | None:
    if isinstance(content, str) or (content is None and may_be_missing):
        return content
    if not isinstance(content, list):
        raise RowProblem(
            ProblemKind.WRONG_TYPE, f"{where}: content is {type(content).__name__}; only text is supported"
        )
    texts = [part if isinstance(part, str) else part.get("text") if _is_text(part) else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        kind = next(
            (part.get("type") if isinstance(part, dict) else type(part).__name__)
            for part, text in zip(content, texts, strict=True)
            if not isinstance(text, str)
        )
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where}: content has a part of type {kind}; only text is supported")
    return "".join(map(str, texts))


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text"


def _listed(calls: Any, where: str) -> list[Any]:
    calls = _from_json(calls, where)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where}: tool_calls is not a list of objects")
    return calls


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """With its arguments as an object, where they spell one: a template would print a string within quotes."""
    function = call.get("function")
    holder = function if isinstance(function, dict) else call
    if not isinstance(holder.get("name"), str):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where}: one of its tool_calls names no function")
    arguments = holder.get("arguments")
    if isinstance(arguments, str):
        try:
            spelled = json.loads(arguments)
        except ValueError:  # a model's own mistake, perhaps what makes the answer the rejected one: as it is
            spelled = None
        if isinstance(spelled, dict):
            holder = {**holder, "arguments": spelled}
    return {**call, "function": holder} if isinstance(function, dict) else holder


def _json_column(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    return None if value is None or value == "" else _from_json(value, f"column '{column}'")


def _from_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is a string that is no JSON ({error})") from error
