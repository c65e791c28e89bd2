"""From a row as it was published to rows as ``records.parse_row`` reads them, one function per form.

Every function takes a row and the options, and returns rows with ``prompt``, ``chosen``, ``rejected`` and what else
``parse_row`` knows. Where a trainer of the form has a chat template write the turns, they become messages here.
Messages keep all their fields. What a form has and none of these functions reads, its entry in ``formats`` names.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from megatron_bdpo.data.messages import ASSISTANT, USER
from megatron_bdpo.data.problems import ProblemKind, RowProblem

type Row = dict[str, Any]
type Messages = list[dict[str, Any]]

#: What every row may bring for its chat template.
FOR_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
#: What a row may say of its two answers, where it says which one is chosen.
OF_ANSWERS = ("chosen_safe", "rejected_safe", "ref_chosen_logps", "ref_rejected_logps", "margin")

PAIRS_FROM = ("best-worst", "all", "adjacent")
PREFERENCES = ("better", "safer")

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

_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class FormatOptions:
    """What the user decides about rows that leave something open."""

    pairs_from: str = PAIRS_FROM[0]
    """Of more than two ranked answers: one pair of the best and the worst, all pairs, or all neighbours."""

    preference: str = PREFERENCES[0]
    """Of answers that are judged twice: the better one is chosen, or the safer one."""


# Rows that are read as they are ---------------------------------------------------------------------------------------


def as_it_is(row: Row, options: FormatOptions) -> list[Row]:
    """``parse_row`` reads it."""
    for name in ("chosen", "rejected"):
        _column(row, name, null=True)
    return [row]


# Rows that name the chosen answer -------------------------------------------------------------------------------------


def openrlhf(row: Row, options: FormatOptions) -> list[Row]:
    """``input`` is the prompt: text, or messages."""
    prompt = _column(row, "input")
    if not isinstance(prompt, str | list) or prompt == []:
        raise _wrong("column 'input'", prompt, "a string or a list of messages")
    answers = {name: _column(row, name) for name in ("chosen", "rejected")}
    return [{"prompt": prompt, **answers, **_passed_on(row, *FOR_TEMPLATE, *OF_ANSWERS)}]


def orca(row: Row, options: FormatOptions) -> list[Row]:
    """``system`` and ``question``, or ``input`` as Argilla's edition has it."""
    return _answered(row, [_turn(USER, _text(row, _first_of(row, "question", "input")))])


def alpaca(row: Row, options: FormatOptions) -> list[Row]:
    """``instruction``, a line break and ``input`` are one turn of the user; ``history`` holds earlier turns."""
    parts = [_text(row, "instruction"), _text(row, "input") if row.get("input") is not None else ""]
    prompt = [*_history(row), _turn(USER, "\n".join(part for part in parts if part))]
    return _answered(row, prompt)


def _history(row: Row) -> Messages:
    turns: Messages = []
    history = row.get("history")
    if not isinstance(history, list | None):
        raise _wrong("column 'history'", history, "a list of [question, answer]")
    for number, pair in enumerate(history or [], start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise _wrong(f"column 'history', turn {number}", pair, "[question, answer]")
        turns += [_turn(USER, pair[0]), _turn(ASSISTANT, pair[1])]
    return turns


def argilla(row: Row, options: FormatOptions) -> list[Row]:
    """``instruction`` or ``prompt``, ``chosen_response``, ``rejected_response``."""
    name = _first_of(row, "instruction", "prompt")
    prompt = _conversation(_column(row, name), f"column '{name}'")
    return _answered(row, prompt, "chosen_response", "rejected_response")


def sharegpt(row: Row, options: FormatOptions) -> list[Row]:
    """``conversations`` up to the answers, which are messages or strings."""
    return _answered(row, _question(row, "conversations"))


def axolotl(row: Row, options: FormatOptions) -> list[Row]:
    """``messages`` (or ``conversation``) up to the answers, which are messages or strings."""
    return _answered(row, _question(row, _first_of(row, "messages", "conversation")))


def _question(row: Row, name: str) -> Messages:
    """Messages that await an answer."""
    prompt = _conversation(_column(row, name), f"column '{name}'")
    if prompt[-1]["role"] == ASSISTANT:
        raise RowProblem(
            ProblemKind.NO_ASSISTANT_TURN,
            f"column '{name}' ends with a turn of the assistant, where chosen and rejected should follow",
        )
    return prompt


def ms_swift(row: Row, options: FormatOptions) -> list[Row]:
    """``messages`` end in the chosen answer; the rejected one alone, or after the same messages once more."""
    chosen = _with_system(row, _messages(_column(row, "messages"), "column 'messages'"))
    passed_on = _passed_on(row, *FOR_TEMPLATE, *OF_ANSWERS)
    if row.get("rejected_messages") is not None:
        if row.get("rejected_response") is not None:
            raise RowProblem(ProblemKind.WRONG_TYPE, "the row has both 'rejected_messages' and 'rejected_response'")
        rejected = _with_system(row, _messages(row["rejected_messages"], "column 'rejected_messages'"))
        return [{"chosen": chosen, "rejected": rejected, **passed_on}]
    rejected = _answer(_column(row, "rejected_response"), "column 'rejected_response'")
    end = len(chosen)
    while end and chosen[end - 1]["role"] == ASSISTANT:
        end -= 1
    if end in (0, len(chosen)):
        raise RowProblem(
            ProblemKind.NO_ASSISTANT_TURN, "column 'messages' is not a question and the chosen answer to it"
        )
    return [{"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected, **passed_on}]


# Rows with two judged answers -----------------------------------------------------------------------------------------


def pku_saferlhf(row: Row, options: FormatOptions) -> list[Row]:
    """Two answers, each safe or not, and which is the better and which the safer one."""
    name = f"{options.preference}_response_id"
    chosen = _column(row, name)
    if not (isinstance(chosen, int) and chosen in (0, 1)):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{name}' is {chosen!r}; 0 or 1 is needed")
    pair = _pair(row, [_turn(USER, _text(row, "prompt"))], *(_text(row, f"response_{i}") for i in (chosen, 1 - chosen)))
    safe, other_safe = (row.get(f"is_response_{i}_safe") for i in (chosen, 1 - chosen))
    return [pair | {"chosen_safe": safe, "rejected_safe": other_safe}]


def helpsteer3(row: Row, options: FormatOptions) -> list[Row]:
    """Below zero the first answer is preferred, above it the second."""
    _column(row, "overall_preference", null=True)
    preference = _grade(row, "overall_preference", "the row")
    prompt = _conversation(_column(row, "context"), "column 'context'")
    first, second = _text(row, "response1"), _text(row, "response2")
    if preference == 0:
        raise RowProblem(ProblemKind.TIED, "column 'overall_preference' is 0")
    return [_pair(row, prompt, first, second) if preference < 0 else _pair(row, prompt, second, first)]


# Rows with ranked answers ---------------------------------------------------------------------------------------------


def ultrafeedback(row: Row, options: FormatOptions) -> list[Row]:
    """``fine-grained_score``, the mean of four ratings, where all answers have it; else ``overall_score``."""
    prompt = [_turn(USER, _text(row, "instruction"))]
    answers = _answers(row, "completions")
    by = "fine-grained_score" if all(_is_grade(each.get("fine-grained_score")) for each in answers) else "overall_score"
    return _ranked(row, prompt, answers, "response", by, options, highest_first=True)


def nectar(row: Row, options: FormatOptions) -> list[Row]:
    """Rank 1 is the best; the prompt is a dialogue in text."""
    prompt = _dialogue(_text(row, "prompt"))
    return _ranked(row, prompt, _answers(row, "answers"), "answer", "rank", options, highest_first=False)


def nemo_rl(row: Row, options: FormatOptions) -> list[Row]:
    """The lowest rank is the best."""
    prompt = _conversation(_column(row, "context"), "column 'context'")
    return _ranked(row, prompt, _answers(row, "completions"), "completion", "rank", options, highest_first=False)


def _answers(row: Row, name: str) -> list[Row]:
    answers = _column(row, name)
    if not (isinstance(answers, list) and all(isinstance(each, dict) for each in answers)):
        raise _wrong(f"column '{name}'", answers, "a list of objects")
    if len(answers) < 2:
        raise RowProblem(ProblemKind.UNRANKED, f"column '{name}' holds {len(answers)} answers; two are needed")
    return answers


def _ranked(
    row: Row, prompt: Messages, answers: list[Row], text: str, by: str, options: FormatOptions, *, highest_first: bool
) -> list[Row]:
    """Pairs of answers of different rank; equal ones keep their order.

    Args:
        text: the answers' field that holds the answer.
        by: the answers' field that ranks them.
    """
    ranks, texts = [], []
    for number, each in enumerate(answers, start=1):
        ranks.append(_grade(each, by, f"answer {number}"))
        texts.append(_answer(_column(each, text, f"answer {number}"), f"'{text}' of answer {number}"))
    order = sorted(range(len(answers)), key=ranks.__getitem__, reverse=highest_first)
    places = {
        "best-worst": [(order[0], order[-1])],
        "all": itertools.combinations(order, 2),
        "adjacent": itertools.pairwise(order),
    }[options.pairs_from]
    unequal = [(better, worse) for better, worse in places if ranks[better] != ranks[worse]]
    pairs = [_pair(row, prompt, texts[better], texts[worse]) for better, worse in unequal]
    if not pairs:
        raise RowProblem(ProblemKind.TIED, f"all answers have '{by}' {ranks[0]}")
    return pairs


def _grade(holder: Row, name: str, where: str) -> float:
    """A score or rank."""
    value = holder.get(name)
    if _is_grade(value):
        return value
    if value is None or isinstance(value, float):
        raise RowProblem(ProblemKind.UNRANKED, f"{where} has no '{name}'")
    raise _wrong(f"'{name}' of {where}", value, "a number")


def _is_grade(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # it may be NaN


def _dialogue(text: str) -> Messages:
    """The turns of ``"\\n\\nHuman: ...\\n\\nAssistant: "``; a text without such markers is one turn of the user."""
    before, *parts = _TURN.split(text)
    if not parts:
        return [_turn(USER, text)]
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if before.strip() or speakers[0] != "Human" or speakers[-1] != "Assistant" or texts.pop():
        raise RowProblem(
            ProblemKind.WRONG_TYPE, "column 'prompt' is no dialogue from '\\n\\nHuman:' to an empty '\\n\\nAssistant:'"
        )
    return [_turn(USER if who == "Human" else ASSISTANT, said) for who, said in zip(speakers, texts, strict=False)]


# Parts of rows --------------------------------------------------------------------------------------------------------


def _answered(row: Row, prompt: Messages, chosen: str = "chosen", rejected: str = "rejected") -> list[Row]:
    """The row that has a prompt and, in these columns, its answers."""
    prompt = _with_system(row, prompt)
    answers = (_answer(_column(row, name), f"column '{name}'") for name in (chosen, rejected))
    return [_pair(row, prompt, *answers) | _passed_on(row, *OF_ANSWERS)]


def _pair(row: Row, prompt: Messages, chosen: str | Messages, rejected: str | Messages) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **_passed_on(row, *FOR_TEMPLATE)}


def _passed_on(row: Row, *names: str) -> Row:
    """Those columns that the row has; LLaMA-Factory writes no tools as an empty string."""
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _with_system(row: Row, messages: Messages) -> Messages:
    """The messages after the row's system prompt, if it has one in a column."""
    if row.get("system") in (None, ""):
        return messages
    system = _turn(SYSTEM, _text(row, "system"))
    if messages[0]["role"] != SYSTEM:
        return [system, *messages]
    if messages[0].get("content") != system["content"]:
        raise RowProblem(ProblemKind.WRONG_TYPE, "column 'system' and the first message are different system prompts")
    return messages


def _conversation(value: Any, where: str) -> Messages:
    """Messages, or the one that a string is."""
    return [_turn(USER, value)] if isinstance(value, str) else _messages(value, where)


def _answer(value: Any, where: str) -> Messages:
    """An answer in any of its forms: text, a message, messages."""
    if isinstance(value, str):
        return [_turn(ASSISTANT, value)]
    return _messages([value] if isinstance(value, dict) else value, where)


def _messages(value: Any, where: str) -> Messages:
    """Messages with the roles of chat templates; calls that follow each other are one turn."""
    if not (isinstance(value, list) and value):
        raise _wrong(where, value, "a list of messages")
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
        raise _wrong(where, value, "an object with 'role' and 'content', or with 'from' and 'value',")
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


def _first_of(row: Row, name: str, other: str) -> str:
    """The column that the row has of two; the first, if none."""
    return other if row.get(name) is None and row.get(other) is not None else name


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise _wrong(f"column '{name}'", value, "a string")
    return value


def _column(row: Row, name: str, where: str = "the row", *, null: bool = False) -> Any:
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


def _wrong(where: str, value: Any, needed: str) -> RowProblem:
    return RowProblem(ProblemKind.WRONG_TYPE, f"{where} is {type(value).__name__}; {needed} is needed")
