"""``megatron-bdpo report``: what reference scores or a run say, as a page, pictures and text."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, Literal

from megatron_bdpo.errors import UserError


def add_parser(subcommands: Any) -> None:
    """Add ``report``."""
    parser = subcommands.add_parser(
        "report",
        help="the comprehension of a data set, or the course of a run, as a page, pictures and text",
        description="Report on a directory of reference scores (comprehension, weights, the most imbalanced pairs) or "
        "on a run's --save (its curves too). Prints text, and writes report.html, one file that needs nothing else, "
        "with each picture beside it as PNG.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="of reference scores, or a run's --save")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the files go (DIR/report)")
    parser.add_argument("--scores", type=Path, metavar="DIR", help="of a run: other scores than those it has used")
    parser.add_argument("--bdpo-temperature", metavar="TAU", help="tau of the weights, or auto (the run's, else 1)")
    parser.add_argument("--bdpo-comprehension", choices=("per-token", "sum"), help="(the run's, else per-token)")
    parser.add_argument("--pairs", type=int, default=20, metavar="N", help="most imbalanced pairs to list (20)")
    parser.add_argument("--show-text", action="store_true", help="show their prompts and answers, whatever they say")
    parser.add_argument("--text-only", action="store_true", help="write no files, only print")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from megatron_bdpo.report.build import ReportSettings, build_report
    from megatron_bdpo.report.style import require_matplotlib

    if options.pairs < 0:
        raise UserError(f"--pairs must be 0 or more, got {options.pairs}.")
    if not options.text_only:
        require_matplotlib()  # before a million pairs are read
    settings = ReportSettings(
        temperature=_temperature(options.bdpo_temperature),
        per_token=None if options.bdpo_comprehension is None else options.bdpo_comprehension == "per-token",
        pairs=options.pairs,
        show_text=options.show_text,
    )
    report = build_report(options.directory, settings, options.scores)
    files = [] if options.text_only else report.write(options.output or options.directory / "report")
    try:
        print(report.as_text())
        if files:
            print(f"\n{files[0]}\nand {len(files) - 1} pictures beside it", flush=True)
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
