"""What has become of a run, in one small file for scripts: ``status.json`` in the directory of ``--save``.

The exit code alone does not say it: Megatron leaves its loop early with 0, and a launcher turns every failure into 1.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.training.distributed import is_rank_zero

#: Names another file, also for what goes wrong before the flags are understood.
ENVIRONMENT = "BDPO_STATUS_FILE"

State = Literal["running", "stopped", "finished", "refused"]


def write_status(state: State, save: str | None, *, step: int = 0, of: int = 0, reason: str = "") -> None:
    """Replace the file, from rank 0, in one piece; nothing where neither ``--save`` nor the environment names one.

    Args:
        state: ``running``, so also after a crash; ``stopped`` early, to be resumed; ``finished``, exports and all;
            ``refused``: flags or data cannot be used, so trying again is in vain.
        save: the directory of ``--save``.
        step: the last optimizer step done; ``of`` so many.
    """
    name = os.environ.get(ENVIRONMENT) or (save and str(Path(save) / "status.json"))
    if not name or not is_rank_zero():
        return
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state": state, "step": step, "of": of, "reason": reason, "time": time.strftime("%FT%T%z")}
    write_whole(path, json.dumps(content) + "\n")
