"""SwanLab: an experiment of a project. ``SWANLAB_API_KEY`` and ``SWANLAB_MODE`` are SwanLab's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from megatron_bdpo.training.reporting.loggers.logger import LoggedRun
from megatron_bdpo.training.reporting.loggers.optional import load

FLAG = "--swanlab-project"


class SwanlabLogger:
    """See ``Logger``."""

    name = "SwanLab"
    gets_all = True

    def __init__(self, project: str, run: LoggedRun) -> None:
        """
        Args:
            project: by name; made where there is none.

        Raises:
            UserError: SwanLab is not installed.
            Exception: of SwanLab: there is no key, or no network.
        """
        self._swanlab: Any = load("swanlab", FLAG)
        before = run.id_there(self.name)
        goes_on = {"id": before, "resume": "allow"} if before else {}
        begun = self._swanlab.init(project=project, name=run.name or None, config=dict(run.flags), **goes_on)
        if id_there := getattr(begun, "id", None):
            run.keep_id(self.name, str(id_there))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._swanlab.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self, state: Literal["finished", "stopped"]) -> None:
        self._swanlab.finish(state="success" if state == "finished" else "aborted")
