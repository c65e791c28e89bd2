"""What the user decides about rows that leave something open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bdpo.errors import UserError

_MARGIN = "margin:"
PAIRS_FROM = ("best-worst", "all", "adjacent", f"{_MARGIN}X")
PREFERENCES = ("better", "safer")


@dataclass(frozen=True)
class FormatOptions:
    """The same for all rows of a source."""

    pairs_from: str = PAIRS_FROM[0]
    """Of more than two ranked answers: one pair of the best and the worst, all pairs, all neighbours, or with
    ``margin:X`` all whose scores (or ranks) are X apart or more."""

    preference: str = PREFERENCES[0]
    """Of answers that are judged twice: the better one is chosen, or the safer one."""

    each_answer: bool = False
    """Of the format ``responses``: rows whose answers nobody has judged, each to be read by itself."""

    def __post_init__(self) -> None:
        if self.pairs_from not in PAIRS_FROM[:-1] and self.margin is None:
            raise UserError(f"--pairs-from {self.pairs_from} is none of {', '.join(PAIRS_FROM)}, X a number above 0.")

    @property
    def margin(self) -> float | None:
        """X of ``margin:X``; None where it is something else."""
        if not self.pairs_from.startswith(_MARGIN):
            return None
        try:
            margin = float(self.pairs_from.removeprefix(_MARGIN))
        except ValueError:
            return None
        return margin if 0 < margin < math.inf else None
