"""``megatron-bdpo score``: what the reference says about every pair, in one process."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subcommands: Any) -> None:
    """Add ``score``, which leaves its flags to Megatron's parser."""
    parser = subcommands.add_parser(
        "score",
        help="score preference pairs with a job's reference, ahead of its training; the flags are the training's "
        "(on several ranks: torchrun -m megatron_bdpo.score)",
        prefix_chars="\0",  # nothing is a flag here
        add_help=False,
    )
    parser.add_argument("flags", nargs="*")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    from megatron_bdpo.training import entry

    entry.score(options.flags)
