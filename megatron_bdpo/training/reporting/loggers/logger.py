"""What a place for metrics has to do, and what it is told of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.json_shape import parse_json

#: In --save: what each place calls the run there, so that one that goes on is one run there too.
NAME = "loggers.json"


class Logger(Protocol):
    """A place for metrics; lives on the last rank. What its methods raise ends the logging, not the run."""

    name: str
    """For people."""
    gets_all: bool
    """Megatron sends nothing there itself."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a logged interval or an evaluation, by name; one may be not finite."""

    def close(self, state: Literal["finished", "stopped"]) -> None:
        """Nothing more comes."""


@dataclass(frozen=True)
class LoggedRun:
    """The run, for a place that shows several."""

    name: str
    """Of --save's directory; empty without one."""
    flags: Mapping[str, object]
    """As given; there is no secret among them."""
    directory: Path | None
    """Of --save."""
    resumed: bool

    def id_there(self, logger: str) -> str | None:
        """What a place called this run when it began; None of one that begins, or that is not known."""
        return self._ids().get(logger) if self.resumed else None

    def keep_id(self, logger: str, id_there: str) -> None:
        """Remember it for a run that goes on from here."""
        if self.directory:
            write_whole(self.directory / NAME, json.dumps({**self._ids(), logger: id_there}) + "\n")

    def _ids(self) -> dict[str, str]:
        try:
            found = parse_json((self.directory / NAME).read_text("utf-8")) if self.directory else {}
        except (OSError, ValueError):
            return {}
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
