"""``run.json`` in the directory of ``--save``: what a run is, for tools that read its metrics.

loss, loss_options   name and options; a number that is not finite is the word for it ("inf")
pairs                number of pairs by use: train, heldout
reference_scores     directory of the scores by store: train, and heldout where that is a store of its own; empty
                     where the reference is not precomputed
imbalance_quartiles  the three edges between the quartiles of the training pairs' |I_w - I_l|; null where not known
seed, data, pair_stores, reference, layout, precision, determinism, versions, machine: see ``provenance``. Of the last
                     start; what earlier ones had otherwise is at the head of their recipes
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import UserError

NAME = "run.json"


def write_record(save: Path, record: Mapping[str, Any]) -> None:
    """Write the file, whole.

    Raises:
        UserError: it cannot be written.
    """
    path = save / NAME
    try:
        write_whole(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
