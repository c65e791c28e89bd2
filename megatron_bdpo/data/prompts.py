"""Prompts that the policy is to answer while it is trained: the rows of ``--eval-prompts``, read and tokenised.

A row is a row of pair data without its answers: ``prompt`` is a string or a list of chat messages. A string means what
it means beside the pairs of the run: text where they are text, one turn of the user where they are chats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from megatron_bdpo.data.messages import USER, Message, template_variables
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import parse_prompt
from megatron_bdpo.data.sources import Row, SourceSpec, describe_row, read_rows
from megatron_bdpo.data.tokenization import PairTokenizer, TokenArray
from megatron_bdpo.errors import UserError

FLAG = "--eval-prompts"

#: What is written beside a row's own columns.
ANSWER_COLUMNS = ("step", "prompt", "answer", "tokens", "finished")


@dataclass(frozen=True)
class PromptRow:
    """One row: its prompt as it was given, its other columns as JSON has them, where it is, what its template reads."""

    prompt: str | list[Message]
    columns: dict[str, Any]
    where: str
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalPrompts:
    """Prompts ready to be answered.

    Attributes:
        tokens: of each row's prompt.
        ends: the sequences of token ids at which an answer ends, of each row.
        longest: tokens of an answer, at most.
        path: of the file.
    """

    rows: list[PromptRow]
    tokens: list[TokenArray]
    ends: list[list[list[int]]]
    longest: int
    path: str

    def describe(self) -> str:
        """In a line."""
        longest = max(map(len, self.tokens))
        return f"{len(self.rows)} of {self.path}, of up to {longest} tokens, answered with up to {self.longest}"


def read_prompts(path: str) -> list[PromptRow]:
    """Read a file of prompts; any source of pair data will do.

    Raises:
        UserError: it cannot be read, is empty, or a row is no prompt; the message names its line.
    """
    source = SourceSpec(path)
    rows = []
    try:
        for number, row in read_rows(source):
            where = describe_row(source, number)
            rows.append(_parse(row, where))
    except RowProblem as problem:
        raise UserError(f"{FLAG}: {where}: {problem}. Correct the row.") from problem
    except UserError as error:
        raise UserError(f"{FLAG}: {error}") from error
    return rows


def _parse(row: Row | RowProblem, where: str) -> PromptRow:
    if isinstance(row, RowProblem):
        raise row
    prompt = parse_prompt(row)
    if taken := [name for name in ANSWER_COLUMNS if name != "prompt" and name in row]:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{taken[0]}' is one that answers are written to: rename it")
    try:
        # A table's values may be dates, for example.
        columns = json.loads(json.dumps({**row, "prompt": None}, allow_nan=False, default=str))
    except ValueError as error:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"a column's value is none of JSON's ({error})") from error
    del columns["prompt"]
    return PromptRow(prompt, columns, where, {} if isinstance(prompt, str) else template_variables(row))


def encode_prompts(
    rows: list[PromptRow], tokenizer: PairTokenizer, path: str, *, chats: bool, longest: int, room: int
) -> EvalPrompts:
    """Tokenise prompts, whole.

    Args:
        path: of their file.
        chats: the pairs of the run are chats.
        longest: tokens of an answer, at most.
        room: for a prompt with its answer, in tokens: --seq-length.

    Raises:
        UserError: a prompt cannot be tokenised, or leaves no room for its answer; the message names its line.
    """
    tokens, ends = [], []
    for row in rows:
        turn = chats and isinstance(row.prompt, str)
        prompt = [{"role": USER, "content": str(row.prompt)}] if turn else row.prompt
        try:
            tokens.append(tokenizer.encode_prompt(prompt, row.variables))
            ends.append(tokenizer.ends(chat=not isinstance(prompt, str)))
        except RowProblem as problem:
            raise UserError(f"{FLAG}: {row.where}: {problem}. Correct the row.") from problem
        except UserError as error:
            raise UserError(f"{FLAG}: {row.where}: {error}") from error
        if len(tokens[-1]) + longest > room:
            raise UserError(
                f"{FLAG}: {row.where}: the prompt's {len(tokens[-1])} tokens and an answer's {longest} do not fit "
                f"--seq-length {room}. Shorten the prompt, or lower --eval-prompt-tokens."
            )
    return EvalPrompts(rows, tokens, ends, longest, path)
