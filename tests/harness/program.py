"""The program, called as a user types it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from megatron_bdpo.cli.main import main
from tests.harness.jobs import DATA

ROOT = Path(__file__).parents[2]
TOKENIZER = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(DATA / "tokenizer.model")]
TINY = ["--recipe", str(ROOT / "recipes" / "tiny.yaml")]


def run(*words: str) -> tuple[int, str, str]:
    """On a rank: exit code, output and errors."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, output.getvalue(), errors.getvalue()
