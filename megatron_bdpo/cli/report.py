"""``megatron-bdpo report``: what reference scores or a run say, as a page, pictures and text."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Literal

import click

from megatron_bdpo.cli.common import NOT_NEGATIVE, PATH, example
from megatron_bdpo.display import show
from megatron_bdpo.errors import UserError


@click.command("report", epilog=example("megatron-bdpo report RUN --text-only"))
@click.argument("directory", type=PATH, metavar="DIR")
@click.option("--output", type=PATH, metavar="DIR", help="Where the files go (DIR/report).")
@click.option("--scores", type=PATH, metavar="DIR", help="Of a run: other scores than those it has used.")
@click.option("--bdpo-temperature", metavar="TAU", help="tau of the weights, or auto (the run's, else 1).")
@click.option("--bdpo-comprehension", type=click.Choice(["per-token", "sum"]), help="(the run's, else per-token)")
@click.option(
    "--pairs", type=NOT_NEGATIVE, default=20, metavar="N", show_default=True, help="Most imbalanced pairs to list."
)
@click.option("--show-text", is_flag=True, help="Show their prompts and answers, whatever they say.")
@click.option("--no-quality", is_flag=True, help="Of a run: do not look for what is wrong with its pairs.")
@click.option("--text-only", is_flag=True, help="Write no files, only print.")
def report(
    directory: Path,
    output: Path | None,
    scores: Path | None,
    bdpo_temperature: str | None,
    bdpo_comprehension: str | None,
    pairs: int,
    show_text: bool,
    no_quality: bool,
    text_only: bool,
) -> None:
    """Report on reference scores or a run.

    DIR is a directory of reference scores (comprehension, weights, the most imbalanced pairs) or a run's --save (its
    curves and the quality of its pairs too). Prints text, and writes report.html, one file that needs nothing else,
    with each picture beside it as PNG.
    """
    from megatron_bdpo.report import build, style  # imports torch

    if not text_only:
        style.require_matplotlib()  # before a million pairs are read
    settings = build.ReportSettings(
        temperature=_temperature(bdpo_temperature),
        per_token=None if bdpo_comprehension is None else bdpo_comprehension == "per-token",
        pairs=pairs,
        show_text=show_text,
        quality=not no_quality,
    )
    built = build.build_report(directory, settings, scores)
    files = [] if text_only else built.write(output or directory / "report")
    try:
        show(*built.blocks())
        if files:
            show("", f"{files[0]}\nand {len(files) - 1} pictures beside it")
    except BrokenPipeError:  # `... | head`: the reader has seen enough, and the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _temperature(text: str | None) -> float | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise UserError(f"--bdpo-temperature must be a number above 0 (inf is allowed) or auto, got {text!r}.")
    return value
