"""The rewards of each held-out pair, at a run's first and latest evaluation: ``heldout_rewards.jsonl`` in --save.

One JSON object per evaluation: ``step``, and lists over the P pairs: ``pair`` (its number among the pairs of
--pair-data, then of --eval-pair-data), ``chosen`` and ``rejected`` (rewards as the loss defines them, null where not
finite), ``chosen_tokens`` and ``rejected_tokens`` (of the answers, those that are scored). A labelled answer is chosen
or rejected, and of the other one there are 0 tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.console import show
from megatron_bdpo.training.reporting.step_lines import Kind, read_lines

NAME = "heldout_rewards.jsonl"
_KIND = Kind("held-out rewards", step="step")
_REWARDS, _TOKENS = ("chosen", "rejected"), ("chosen_tokens", "rejected_tokens")


@dataclass(frozen=True, eq=False)
class HeldOutRewards:
    """Of one evaluation. P pairs."""

    step: int
    """After which it was."""
    pairs: npt.NDArray[np.int64]
    """[P]"""
    rewards: npt.NDArray[np.float64]
    """[P, 2] of chosen and rejected; NaN where not finite."""
    tokens: npt.NDArray[np.integer]
    """[P, 2]; 0 where a labelled answer has no other beside it."""


class HeldOutFile:
    """Keeps the first and the latest evaluation.

    Args:
        path: the file.
        step: where the run starts. What the file says of later ones belongs to steps that are done again, or, at 0, to
            another run: it is dropped.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._failed = path, False
        try:
            self._lines = {each.step: _line(each) for each in read_heldout(path) if step and each.step <= step}
            if path.exists():
                self._write()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error

    def add(self, evaluation: HeldOutRewards) -> None:
        """Put an evaluation in the place of all but the first. A failure is said once: the run does not need it."""
        first = min([*self._lines, evaluation.step])
        kept = {step: line for step, line in self._lines.items() if step == first}
        self._lines = kept | {evaluation.step: _line(evaluation)}
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                show(f"WARNING: {self._path} cannot be written, the rewards of held-out pairs are lost: {error}")
            self._failed = True

    def _write(self) -> None:
        write_whole(self._path, "".join(self._lines.values()))


def read_heldout(path: Path) -> list[HeldOutRewards]:
    """The evaluations in a file, in its order; none where there is no file.

    Raises:
        UserError: a line is none; the message names it.
        OSError: the file cannot be read.
    """
    return [_evaluation(record, path, number) for number, record in enumerate(read_lines(path, _KIND), 1)]


def _line(evaluation: HeldOutRewards) -> str:
    columns: dict[str, Any] = {"step": evaluation.step, "pair": evaluation.pairs.tolist()}
    for place, (rewards, tokens) in enumerate(zip(_REWARDS, _TOKENS, strict=True)):
        values = evaluation.rewards[:, place].tolist()
        columns[rewards] = [value if math.isfinite(value) else None for value in values]
        columns[tokens] = evaluation.tokens[:, place].tolist()
    return json.dumps(columns, allow_nan=False) + "\n"


def _evaluation(record: Mapping[str, Any], path: Path, number: int) -> HeldOutRewards:
    try:
        pairs = np.array(record["pair"], np.int64).reshape(-1)
        rewards = np.array([record[name] for name in _REWARDS], np.float64).reshape(2, len(pairs))
        tokens = np.array([record[name] for name in _TOKENS], np.int64).reshape(2, len(pairs))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}, line {number} holds no rewards of pairs ({told}). Move the file away.") from error
    return HeldOutRewards(record[_KIND.step], pairs, rewards.T, tokens.T)
