"""Rows of one answer and a label, as trainers of KTO read them; see ``format_converters``.

Each becomes what ``records.parse_row`` reads as a labelled answer: ``completion`` and ``label``, with the ``prompt`` or
as a whole conversation.
"""

from __future__ import annotations

from megatron_bdpo.data.format_converters import alpaca_prompt
from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import ANSWER_REFERENCE, COMPLETION, LABEL, is_desirable
from megatron_bdpo.data.row_parts import (
    FOR_TEMPLATE,
    Messages,
    Row,
    as_answer,
    as_conversation,
    as_messages,
    column_of,
    first_of,
    passed_on,
    with_system,
    wrong_type,
)

#: LLaMA-Factory's name of the label.
KTO_TAG = "kto_tag"
#: Columns of which one holds the prompt.
AXOLOTL_PROMPTS = ("instruction", "question", "prompt")


def axolotl(row: Row, options: FormatOptions) -> list[Row]:
    """``instruction``, ``question`` or ``prompt`` is the user's turn, after ``system``."""
    name = next((each for each in AXOLOTL_PROMPTS if row.get(each) is not None), None)
    if name is None:
        wanted = ", ".join(f"'{each}'" for each in AXOLOTL_PROMPTS)
        raise RowProblem(ProblemKind.MISSING_COLUMN, f"the row has a prompt in none of the columns {wanted}")
    prompt = as_conversation(column_of(row, name), f"column '{name}'")
    return _labelled(row, with_system(row, prompt), COMPLETION)


def ms_swift(row: Row, options: FormatOptions) -> list[Row]:
    """``messages`` end in the answer."""
    return _conversation(row, "messages", LABEL)


def llama_factory(row: Row, options: FormatOptions) -> list[Row]:
    """``conversations``, in ShareGPT's form, or ``messages``, in OpenAI's, end in the answer."""
    return _conversation(row, first_of(row, "conversations", "messages"), KTO_TAG)


def alpaca(row: Row, options: FormatOptions) -> list[Row]:
    """``output`` is the answer."""
    return _labelled(row, with_system(row, alpaca_prompt(row)), "output", KTO_TAG)


def openrlhf(row: Row, options: FormatOptions) -> list[Row]:
    """``input`` and ``output`` are text, joined as they are, or messages."""
    parts = {"prompt": "input", COMPLETION: "output"}
    for column in parts.values():
        value = column_of(row, column)
        if not isinstance(value, str | list) or value == []:
            raise wrong_type(f"column '{column}'", value, "a string or a list of messages")
    return [_beside(row, LABEL) | {ours: row[theirs] for ours, theirs in parts.items()}]


def _labelled(row: Row, prompt: Messages, answer: str, label: str = LABEL) -> list[Row]:
    """The answer is in a column of its own."""
    return [
        {"prompt": prompt, COMPLETION: as_answer(column_of(row, answer), f"column '{answer}'"), **_beside(row, label)}
    ]


def _conversation(row: Row, name: str, label: str) -> list[Row]:
    """The answer is the end of a conversation."""
    messages = with_system(row, as_messages(column_of(row, name), f"column '{name}'"))
    return [{COMPLETION: messages, **_beside(row, label)}]


def _beside(row: Row, label: str) -> Row:
    return {LABEL: is_desirable(row, label), **passed_on(row, *FOR_TEMPLATE, ANSWER_REFERENCE)}
