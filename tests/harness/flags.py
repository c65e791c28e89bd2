"""Megatron's flags at the price of one reading of their descriptions."""

from __future__ import annotations

import sys
from typing import Any


def remember_descriptions_of_flags() -> None:
    """Keep what Megatron reads out of its own source for ``--help``, if it is imported.

    It does so at every parsing of flags, for 0.15 s; a run of the tests parses flags some thousand times.
    """
    module: Any = sys.modules.get("megatron.training.argument_utils")
    if module is None or hasattr(module, "_read_descriptions"):
        return
    factory = module.ArgumentGroupFactory
    module._read_descriptions, known = factory._get_field_docstrings, {}

    def descriptions(self: Any, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = module._read_descriptions(self, config)
        return dict(known[config])

    factory._get_field_docstrings = descriptions
