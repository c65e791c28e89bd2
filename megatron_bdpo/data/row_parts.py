"""Parts of published rows: columns, turns and answers in the forms that they are written in, as messages.

What every converter reads rows with. ``format_converters`` has those of rows with two answers, ``ranked_answers`` those
of rows with any number.
"""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from megatron_bdpo.data.messages import ASSISTANT, USER
from megatron_bdpo.data.problems import ProblemKind, RowProblem

type Row = dict[str, Any]
type Messages = list[dict[str, Any]]

#: What every row may bring for its chat template.
FOR_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
#: What a row may say of its two answers, where it says which one is chosen.
OF_ANSWERS = ("chosen_safe", "rejected_safe", "ref_chosen_logps", "ref_rejected_logps", "margin")

SYSTEM, TOOL = "system", "tool"
#: Roles of ShareGPT, LLaMA-Factory and ms-swift -> those of chat templates.
_ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": SYSTEM,
    "observation": TOOL,
    "tool_response": TOOL,
    "tool": TOOL,
}
#: Their roles whose text is a call in JSON: ``{"name": ..., "arguments": ...}``, or a list of them.
_CALLS = ("function_call", "tool_call")


def answered_row(row: Row, prompt: Messages, chosen: str = "chosen", rejected: str = "rejected") -> list[Row]:
    """The row that has a prompt and, in these columns, its answers."""
    prompt = with_system(row, prompt)
    answers = (as_answer(column_of(row, name), f"column '{name}'") for name in (chosen, rejected))
    return [pair_row(row, prompt, *answers) | passed_on(row, *OF_ANSWERS)]


def pair_row(row: Row, prompt: Messages, chosen: str | Messages, rejected: str | Messages) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **passed_on(row, *FOR_TEMPLATE)}


def passed_on(row: Row, *names: str) -> Row:
    """Those columns that the row has; LLaMA-Factory writes no tools as an empty string."""
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def turn_of(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages after the row's system prompt, if it has one in a column."""
    if row.get("system") in (None, ""):
        return messages
    system = turn_of(SYSTEM, text_of(row, "system"))
    if messages[0]["role"] != SYSTEM:
        return [system, *messages]
    if messages[0].get("content") != system["content"]:
        raise RowProblem(ProblemKind.WRONG_TYPE, "column 'system' and the first message are different system prompts")
    return messages


def as_conversation(value: Any, where: str) -> Messages:
    """Messages, or the one that a string is."""
    return [turn_of(USER, value)] if isinstance(value, str) else as_messages(value, where)


def as_answer(value: Any, where: str) -> Messages:
    """An answer in any of its forms: text, a message, messages."""
    if isinstance(value, str):
        return [turn_of(ASSISTANT, value)]
    if not isinstance(value, dict | list):
        raise wrong_type(where, value, "a string, a message or a list of messages")
    return as_messages([value] if isinstance(value, dict) else value, where)


def as_messages(value: Any, where: str) -> Messages:
    """Messages with the roles of chat templates; calls that follow each other are one turn."""
    if not (isinstance(value, list) and value):
        raise wrong_type(where, value, "a list of messages")
    messages: Messages = []
    is_call = False
    for number, each in enumerate(value, start=1):
        message = _message(each, f"{where}, message {number}")
        was_call, is_call = is_call, _role(each) in _CALLS
        if was_call and is_call:
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    return messages


def _message(value: Any, where: str) -> dict[str, Any]:
    """One message, written with ``role`` and ``content`` or with ``from`` and ``value``."""
    role = _role(value)
    if role is None:
        raise wrong_type(where, value, "an object with 'role' and 'content', or with 'from' and 'value',")
    if value.get("from") is None:
        message = dict(value)
    else:
        if role not in _ROLES and role not in _CALLS:
            raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is from {role!r}; known are {', '.join(_ROLES)}")
        others = {name: each for name, each in value.items() if name not in ("from", "value", "role", "content")}
        message = {"role": role, "content": value.get("value"), **others}
    if role in _CALLS:
        return {**message, "role": ASSISTANT, "content": "", "tool_calls": _calls(message.get("content"), where)}
    return {**message, "role": _ROLES.get(role, role)}


def _role(message: Any) -> str | None:
    if not isinstance(message, dict):
        return None
    role = message["role"] if message.get("from") is None and "role" in message else message.get("from")
    return role if isinstance(role, str) else None


def _calls(text: Any, where: str) -> list[Row]:
    """Tool calls as chat templates read them."""
    try:
        calls = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is no call in JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"{where} is no call with a 'name' and 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def first_of(row: Row, name: str, other: str) -> str:
    """The column that the row has of two; the first, if none."""
    return other if row.get(name) is None and row.get(other) is not None else name


def text_of(row: Row, name: str) -> str:
    value = column_of(row, name)
    if not isinstance(value, str):
        raise wrong_type(f"column '{name}'", value, "a string")
    return value


def column_of(row: Row, name: str, where: str = "the row", *, null: bool = False) -> Any:
    """What the row, or a part of it, has there.

    Args:
        null: it may be null.
    """
    if name not in row:
        names = ", ".join(sorted(row)) or "no columns"
        raise RowProblem(ProblemKind.MISSING_COLUMN, f"column '{name}' is missing; {where} has {names}")
    if row[name] is None and not null:
        raise RowProblem(ProblemKind.MISSING_COLUMN, f"column '{name}' of {where} is null")
    return row[name]


def wrong_type(where: str, value: Any, needed: str) -> RowProblem:
    return RowProblem(ProblemKind.WRONG_TYPE, f"{where} is {type(value).__name__}; {needed} is needed")


def grade_of(holder: Row, name: str, where: str) -> float:
    """A score or rank."""
    value = holder.get(name)
    if is_grade(value):
        return value
    if value is None or isinstance(value, float):
        raise RowProblem(ProblemKind.UNRANKED, f"{where} has no '{name}'")
    raise wrong_type(f"'{name}' of {where}", value, "a number")


def is_grade(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # it may be NaN
