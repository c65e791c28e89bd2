"""Commands as the documents have them: indented blocks, shell fences, and commands within a sentence."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import pages

ROOT = Path(__file__).parents[2]

DOCUMENTS = (
    *(
        "README.md",
        "CONTRIBUTING.md",
        "slurm/README.md",
        "examples/paper/README.md",
        "examples/data/README.md",
        "examples/iterative/README.md",
    ),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
)

#: What a command begins with, behind settings of the environment.
PROGRAMS = frozenset(
    [
        "bash",
        "cd",
        "eval",
        "export",
        "for",
        "git",
        "lm_eval",
        "make",
        "megatron-bdpo",
        "pip",
        "pytest",
        "python",
        "sbatch",
        "scancel",
        "torchrun",
        "touch",
        "vllm",
    ]
)

_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Command:
    """One command of a document.

    Attributes:
        environment: what is set in front of it.
        words: the program, without its directory, and its arguments.
    """

    document: str
    text: str
    environment: dict[str, str]
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def commands() -> list[Command]:
    """Every command of every document, in their order; the same command of one document once."""
    found = (command for document in DOCUMENTS for command in _in_document(document))
    return list({str(command): command for command in found}.values())


def _in_document(document: str) -> Iterator[Command]:
    text = pages.by_hand((ROOT / document).read_text("utf-8"))
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = [body for language, body in fences if language in ("bash", "sh", "console")]
    blocks += re.findall(r"(?:^    .*\n|^\n(?=    ))+", prose, re.M)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield from _commands(document, line.strip())
    without_blocks = re.sub(r"^    .*$", "", prose, flags=re.M)
    for quoted in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks):
        if " " in quoted.strip():
            yield from _commands(document, " ".join(quoted.split()))


def _commands(document: str, line: str) -> Iterator[Command]:
    """Of one line; a loop's body is part of the line that it is in."""
    for part in re.split(r" && |; do ", re.sub(r"^\$ ", "", line)):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a formula, a row of data
            return
        environment = {}
        while words and _ASSIGNMENT.match(words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words and words[0].removeprefix(".venv/bin/") in PROGRAMS:
            words[0] = words[0].removeprefix(".venv/bin/")
            shown = " ".join(part.split("  #")[0].split())
            yield Command(document, shown, environment, tuple(word.rstrip(";") for word in words))
