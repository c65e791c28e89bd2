"""Write megatron_bdpo/training/flags/flag_table.json: after a change of our flags, and for another megatron-core.

The schema of recipes follows from it and is written too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools`, wherever this is started

from megatron_bdpo.platform.boot import prepare_platform

prepare_platform()

from megatron.training.arguments import add_megatron_arguments  # noqa: E402  # the platform comes first

from megatron_bdpo.losses import registry  # noqa: E402
from megatron_bdpo.training.flags.arguments import add_preference_arguments, mend_help  # noqa: E402
from megatron_bdpo.training.flags.flag_help import OWN  # noqa: E402
from megatron_bdpo.training.flags.flag_table import FILE, Loss, described, read  # noqa: E402
from tools import recipe_schema  # noqa: E402


def content() -> dict[str, Any]:
    """What the file is to hold."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    add_preference_arguments(parser)
    mend_help(parser)
    losses = {
        spec.name: Loss([each.name for each in fields(spec.options)], list(spec.elsewhere))
        for spec in registry.all_specs()
    }
    return described(parser, importlib.metadata.version("megatron-core"), losses, OWN)


def text() -> str:
    """The file as it is to be."""
    return json.dumps(content(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
    recipe_schema.FILE.write_text(recipe_schema.text(read()), "utf-8")
