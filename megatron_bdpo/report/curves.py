"""A run's metrics as series over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.metrics_file import NAME, read

QUARTILES = ("q1", "q2", "q3", "q4")


@dataclass(frozen=True, eq=False)
class Series:
    """One metric: [n] iterations in order, [n] values; NaN where it was not finite."""

    iterations: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.iterations)


@dataclass(frozen=True, eq=False)
class Curves:
    """All metrics of a run, by name; a name that is not there was not reported."""

    training: Mapping[str, Series]
    held_out: Mapping[str, Series]

    @property
    def last_iteration(self) -> int:
        return int(max(series.iterations[-1] for series in (*self.training.values(), *self.held_out.values())))

    def has(self, names: Iterable[str]) -> bool:
        """Whether any of them was reported."""
        return any(name in self.training or name in self.held_out for name in names)


def read_curves(run: Path) -> Curves:
    """The curves of a run directory.

    Raises:
        UserError: its metrics cannot be read, or there are none yet.
    """
    path = run / NAME
    try:
        records = read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not records:
        raise UserError(f"{path} holds no record yet: the run has not come to its first logged step.")
    return Curves(_series(records, "step"), _series(records, "evaluation"))


def _series(records: list[dict[str, Any]], kind: str) -> dict[str, Series]:
    points: dict[str, dict[int, float]] = {}
    for record in records:
        if record["kind"] == kind:
            for name, value in record.items():
                if name not in ("kind", "iteration") and (value is None or isinstance(value, int | float)):
                    points.setdefault(name, {})[record["iteration"]] = np.nan if value is None else float(value)
    return {
        name: Series(np.array(sorted(found)), np.array([found[iteration] for iteration in sorted(found)]))
        for name, found in points.items()
    }


def smoothed(series: Series, width: int) -> Series:
    """A centred running mean over ``width`` points, shorter at the ends."""
    if width <= 1:
        return series
    finite = np.isfinite(series.values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(finite, series.values, 0), kernel, "same")
    counts = np.convolve(finite.astype(float), kernel, "same")
    return Series(series.iterations, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
