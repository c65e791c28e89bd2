"""The policy's answers as a file for anybody's tools: ``generations.jsonl`` in the directory of ``--save``.

One JSON object per prompt and evaluation: the columns of the prompt's row, and ``step``, ``prompt`` (as in its file),
``answer`` (its text), ``tokens`` (how many, with the end) and ``finished`` (false: cut at the longest answer).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bdpo.training.reporting.step_lines import Kind, StepLines, read_lines

NAME = "generations.jsonl"
_KIND = Kind("generations", step="step")

type Row = dict[str, Any]


def open_generations(path: Path, step: int) -> StepLines:
    """The file to add an evaluation's rows to, at once; ``step``: where the run starts.

    Raises:
        UserError: it cannot be read or written.
    """
    return StepLines(path, step, _KIND)


def read_generations(path: Path) -> list[Row]:
    """The rows of a file, in its order; none where there is no file.

    Raises:
        UserError: a line is no row; the message names it.
        OSError: the file cannot be read.
    """
    return read_lines(path, _KIND)


@dataclass(frozen=True)
class SideBySide:
    """The first and the last evaluation's answers to the same prompts."""

    steps: tuple[int, int]
    """Of the two."""
    rows: list[tuple[str, str, str]]
    """Prompt, first answer, last answer, as texts for people."""


def side_by_side(rows: Sequence[Row]) -> SideBySide | None:
    """Lay the first answers beside the last; None where there are none. A single evaluation is both."""
    if not rows:
        return None
    first, last = rows[0]["step"], rows[-1]["step"]
    before = {json.dumps(row.get("prompt")): row for row in rows if row["step"] == first}
    pairs = [
        (prompt_text(row.get("prompt")), answer_text(before.get(json.dumps(row.get("prompt")), {})), answer_text(row))
        for row in rows
        if row["step"] == last
    ]
    return SideBySide((first, last), pairs)


def prompt_text(prompt: Any) -> str:
    """A prompt for people: a string, the only message's content, or all contents by role."""
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return str(prompt)
    if len(prompt) == 1:
        return str(prompt[0].get("content"))
    return " ".join(f"[{message.get('role')}] {message.get('content')}" for message in prompt)


def answer_text(row: Row) -> str:
    """An answer for people; what was cut ends in an ellipsis."""
    return str(row.get("answer", "")) + ("" if row.get("finished", True) else " …")
