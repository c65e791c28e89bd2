"""From a row as it was published to rows as ``records.parse_row`` reads them, one function per form.

Every function takes a row and the options, and returns rows with ``prompt``, ``chosen``, ``rejected`` and what else
``parse_row`` knows. Where a trainer of the form has a chat template write the turns, they become messages here.
Messages keep all their fields. What a form has and none of these functions reads, its entry in ``formats`` names.
"""

from __future__ import annotations

from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.messages import ASSISTANT, USER
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import COMPLETION, LABEL, is_labelled
from megatron_bdpo.data.row_parts import (
    FOR_TEMPLATE,
    OF_ANSWERS,
    Messages,
    Row,
    answered_row,
    as_answer,
    as_conversation,
    as_messages,
    column_of,
    first_of,
    grade_of,
    pair_row,
    passed_on,
    text_of,
    turn_of,
    with_system,
    wrong_type,
)

# Rows that are read as they are ---------------------------------------------------------------------------------------


def as_it_is(row: Row, options: FormatOptions) -> list[Row]:
    """``parse_row`` reads it, a pair or a labelled answer."""
    for name in (COMPLETION, LABEL) if is_labelled(row) else ("chosen", "rejected"):
        column_of(row, name, null=True)
    return [row]


# Rows that name the chosen answer -------------------------------------------------------------------------------------


def openrlhf(row: Row, options: FormatOptions) -> list[Row]:
    """``input`` is the prompt: text, or messages."""
    prompt = column_of(row, "input")
    if not isinstance(prompt, str | list) or prompt == []:
        raise wrong_type("column 'input'", prompt, "a string or a list of messages")
    answers = {name: column_of(row, name) for name in ("chosen", "rejected")}
    return [{"prompt": prompt, **answers, **passed_on(row, *FOR_TEMPLATE, *OF_ANSWERS)}]


def orca(row: Row, options: FormatOptions) -> list[Row]:
    """``system`` and ``question``, or ``input`` as Argilla's edition has it."""
    return answered_row(row, [turn_of(USER, text_of(row, first_of(row, "question", "input")))])


def alpaca(row: Row, options: FormatOptions) -> list[Row]:
    """See :func:`alpaca_prompt`."""
    return answered_row(row, alpaca_prompt(row))


def alpaca_prompt(row: Row) -> Messages:
    """``instruction``, a line break and ``input`` are one turn of the user; ``history`` holds earlier turns."""
    parts = [text_of(row, "instruction"), text_of(row, "input") if row.get("input") is not None else ""]
    return [*_history(row), turn_of(USER, "\n".join(part for part in parts if part))]


def _history(row: Row) -> Messages:
    turns: Messages = []
    history = row.get("history")
    if not isinstance(history, list | None):
        raise wrong_type("column 'history'", history, "a list of [question, answer]")
    for number, pair in enumerate(history or [], start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise wrong_type(f"column 'history', turn {number}", pair, "[question, answer]")
        turns += [turn_of(USER, pair[0]), turn_of(ASSISTANT, pair[1])]
    return turns


def argilla(row: Row, options: FormatOptions) -> list[Row]:
    """``instruction`` or ``prompt``, ``chosen_response``, ``rejected_response``."""
    name = first_of(row, "instruction", "prompt")
    prompt = as_conversation(column_of(row, name), f"column '{name}'")
    return answered_row(row, prompt, "chosen_response", "rejected_response")


def sharegpt(row: Row, options: FormatOptions) -> list[Row]:
    """``conversations`` up to the answers, which are messages or strings."""
    return answered_row(row, _question(row, "conversations"))


def axolotl(row: Row, options: FormatOptions) -> list[Row]:
    """``messages`` (or ``conversation``) up to the answers, which are messages or strings."""
    return answered_row(row, _question(row, first_of(row, "messages", "conversation")))


def _question(row: Row, name: str) -> Messages:
    """Messages that await an answer."""
    prompt = as_conversation(column_of(row, name), f"column '{name}'")
    if prompt[-1]["role"] == ASSISTANT:
        raise RowProblem(
            ProblemKind.NO_ASSISTANT_TURN,
            f"column '{name}' ends with a turn of the assistant, where chosen and rejected should follow",
        )
    return prompt


def ms_swift(row: Row, options: FormatOptions) -> list[Row]:
    """``messages`` end in the chosen answer; the rejected one alone, or after the same messages once more."""
    chosen = with_system(row, as_messages(column_of(row, "messages"), "column 'messages'"))
    beside = passed_on(row, *FOR_TEMPLATE, *OF_ANSWERS)
    if row.get("rejected_messages") is not None:
        if row.get("rejected_response") is not None:
            raise RowProblem(ProblemKind.WRONG_TYPE, "the row has both 'rejected_messages' and 'rejected_response'")
        rejected = with_system(row, as_messages(row["rejected_messages"], "column 'rejected_messages'"))
        return [{"chosen": chosen, "rejected": rejected, **beside}]
    rejected = as_answer(column_of(row, "rejected_response"), "column 'rejected_response'")
    end = len(chosen)
    while end and chosen[end - 1]["role"] == ASSISTANT:
        end -= 1
    if end in (0, len(chosen)):
        raise RowProblem(
            ProblemKind.NO_ASSISTANT_TURN, "column 'messages' is not a question and the chosen answer to it"
        )
    return [{"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected, **beside}]


# Rows with two judged answers -----------------------------------------------------------------------------------------


def pku_saferlhf(row: Row, options: FormatOptions) -> list[Row]:
    """Two answers, each safe or not, and which is the better and which the safer one."""
    name = f"{options.preference}_response_id"
    chosen = column_of(row, name)
    if not (isinstance(chosen, int) and chosen in (0, 1)):
        raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{name}' is {chosen!r}; 0 or 1 is needed")
    answers = (text_of(row, f"response_{i}") for i in (chosen, 1 - chosen))
    pair = pair_row(row, [turn_of(USER, text_of(row, "prompt"))], *answers)
    safe, other_safe = (row.get(f"is_response_{i}_safe") for i in (chosen, 1 - chosen))
    return [pair | {"chosen_safe": safe, "rejected_safe": other_safe}]


def helpsteer3(row: Row, options: FormatOptions) -> list[Row]:
    """Below zero the first answer is preferred, above it the second."""
    column_of(row, "overall_preference", null=True)
    preference = grade_of(row, "overall_preference", "the row")
    prompt = as_conversation(column_of(row, "context"), "column 'context'")
    first, second = text_of(row, "response1"), text_of(row, "response2")
    if preference == 0:
        raise RowProblem(ProblemKind.TIED, "column 'overall_preference' is 0")
    return [pair_row(row, prompt, first, second) if preference < 0 else pair_row(row, prompt, second, first)]
