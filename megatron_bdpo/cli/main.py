"""``megatron-bdpo``: what is done beside a training job. ``megatron-bdpo SUBCOMMAND --help`` says more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_bdpo.cli import convert, plan, report, score
from megatron_bdpo.errors import UserError

#: Each adds its parser, with a ``run`` that takes the parsed arguments. None imports Megatron before it runs.
_SUBCOMMANDS = (convert, score, report, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command. Returns the exit code: 2 for what the user can put right, with one line that says what."""
    parser = argparse.ArgumentParser("megatron-bdpo", description=__doc__)
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subcommands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        if not error.shown:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
