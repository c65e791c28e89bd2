"""Comprehension of the pairs of a score directory, and the weights and scales that it gives. P scored pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_bdpo.comprehension import (
    automatic_temperature,
    balanced_weights,
    gradient_scale,
    mutual_information,
)
from megatron_bdpo.data.sources import SourceSpec, describe_row, read_rows
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference.cache import Scores

FloatArray = npt.NDArray[np.float64]

#: Of every distribution the report tells these.
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, eq=False)
class Comprehension:
    """The pairs of a score directory that have both scores.

    Attributes:
        ids: [P] index in the token store, and in the scores.
        chosen, rejected: [P] I_w and I_l, in nats per token, or nats where ``per_token`` is False.
        temperature: tau, in the same unit.
        weights: [P, 2] of chosen and rejected; scale: [P].
        tokens: [P, 2] response tokens.
        places: which row of which source a pair is: [P] each.
        total: pairs in the directory, scored or not.
    """

    ids: npt.NDArray[np.int64]
    chosen: FloatArray
    rejected: FloatArray
    temperature: float
    per_token: bool
    weights: FloatArray
    scale: FloatArray
    tokens: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int16]
    rows: npt.NDArray[np.int64]
    source_paths: list[str]
    total: int
    manifest: dict[str, Any]

    @property
    def difference(self) -> FloatArray:
        """[P] I_w - I_l."""
        return self.chosen - self.rejected

    @property
    def unit(self) -> str:
        return "nats per token" if self.per_token else "nats"

    @property
    def automatic_temperature(self) -> float:
        """What ``--bdpo-temperature auto`` would be, if these pairs were trained on; 0 where nothing is unbalanced."""
        return automatic_temperature(torch.from_numpy(self.chosen), torch.from_numpy(self.rejected))

    def distributions(self) -> dict[str, FloatArray]:
        """What the tables describe, by label."""
        return {
            "I_w": self.chosen,
            "I_l": self.rejected,
            "I_w - I_l": self.difference,
            "|I_w - I_l|": np.abs(self.difference),
            "w_w": self.weights[:, 0],
            "w_l": self.weights[:, 1],
            "scale": self.scale,
        }

    def largest(self, count: int) -> npt.NDArray[np.int64]:
        """Indices into the arrays here of the most imbalanced pairs, the most imbalanced first."""
        size = np.abs(self.difference)
        if not 0 < count < len(size):
            return np.argsort(-size, kind="stable")[:count]
        some = np.flatnonzero(size >= np.partition(size, -count)[-count])  # in their order, more where some are equal
        return some[np.argsort(-size[some], kind="stable")[:count]]

    def place(self, index: int) -> str:
        """Where a pair comes from, in words."""
        source = int(self.sources[index])
        if not 0 <= source < len(self.source_paths):
            return "unknown"
        return describe_row(SourceSpec(self.source_paths[source]), int(self.rows[index]))

    def texts(self, indices: npt.NDArray[np.int64]) -> dict[int, dict[str, Any]]:
        """The rows of some pairs, as their sources have them, by index.

        Raises:
            UserError: a source cannot be read any more.
        """
        wanted: dict[tuple[int, int], list[int]] = {}  # a row of several answers may give several pairs
        for index in indices:
            wanted.setdefault((int(self.sources[index]), int(self.rows[index])), []).append(int(index))
        found: dict[int, dict[str, Any]] = {}
        for source in sorted({source for source, _ in wanted}):
            last = max(row for of, row in wanted if of == source)
            for row, content in read_rows(SourceSpec(self.source_paths[source])):
                if (source, row) in wanted and isinstance(content, dict):
                    found |= dict.fromkeys(wanted[source, row], content)
                if row >= last:
                    break
        return found


def has_comprehension(scores: Scores) -> bool:
    """Whether some pair has both scores."""
    return bool(_are_known(scores).any())


def _are_known(scores: Scores) -> npt.NDArray[np.bool_]:
    """[P] pairs that have both."""
    return np.isfinite(scores.conditional).all(axis=1) & np.isfinite(scores.unconditional).all(axis=1)


def comprehension_of(
    scores: Scores, temperature: float | Literal["auto"], *, per_token: bool, where: str
) -> Comprehension:
    """Compute it.

    Args:
        temperature: tau, or "auto" for ``comprehension.automatic_temperature``.
        where: the scores' name, for messages.

    Raises:
        UserError: no pair has both scores.
    """
    ids = np.flatnonzero(_are_known(scores))
    if not len(ids):
        raise UserError(
            f"{where}: no pair has both the conditional and the unconditional score, so there is no comprehension to "
            "show. Score with a loss that reads it: --preference-loss bdpo."
        )
    conditional, unconditional = (
        torch.from_numpy(values[ids]) for values in (scores.conditional, scores.unconditional)
    )
    tokens = torch.from_numpy(np.ascontiguousarray(scores.tokens[ids]))
    chosen, rejected = (
        mutual_information(conditional[:, i], unconditional[:, i], tokens[:, i], per_token) for i in (0, 1)
    )
    tau = automatic_temperature(chosen, rejected) or math.inf if temperature == "auto" else temperature
    w_w, w_l = balanced_weights(chosen, rejected, tau)
    return Comprehension(
        ids=ids,
        chosen=chosen.numpy(),
        rejected=rejected.numpy(),
        temperature=tau,
        per_token=per_token,
        weights=torch.stack([w_w, w_l], dim=1).numpy(),
        scale=gradient_scale(w_w, w_l).numpy(),
        tokens=scores.tokens[ids],
        sources=scores.source[ids],
        rows=scores.row[ids],
        source_paths=[str(path) for path in scores.manifest.get("sources", [])],
        total=len(scores),
        manifest=scores.manifest,
    )


def summary(values: FloatArray) -> list[float]:
    """Mean, standard deviation, and ``PERCENTILES``."""
    return [float(values.mean()), float(values.std()), *(float(p) for p in np.percentile(values, PERCENTILES))]
