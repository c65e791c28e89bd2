"""The arrays of a token store: their types, and whether they fit each other. See ``store`` for what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.labels import PAIR, UNJUDGED

TOKENS = "tokens"
#: Name -> dtype and columns.
ARRAYS: dict[str, tuple[str, int | None]] = {
    TOKENS: ("<i4", None),
    "starts": ("<i8", 3),
    "lengths": ("<i4", 3),
    "source": ("<i2", None),
    "row": ("<i8", None),
    "unsafe": ("<i1", 2),
    "label": ("<i1", None),
    "reference": ("<f8", 2),
    "margin": ("<f8", None),
    "score": ("<f8", 2),
    "context": ("<i8", 2),
    "prompt_of": ("<i4", None),
    "own_prompts": ("<i4", None),
    "own_lengths": ("<i4", None),
}
MAY_BE_EMPTY = frozenset({"reference", "margin", "score", "context", "own_prompts", "own_lengths"})
#: Those that have a row for each pair, or none where no pair has any.
OPTIONAL = ("reference", "margin", "score")
#: Those that have a row for each pair.
_BY_PAIR = ("starts", "lengths", "source", "row", "unsafe", "label", "prompt_of")


def inconsistency(arrays: Mapping[str, npt.NDArray[Any]], sources: int) -> str | None:
    """How the arrays do not fit each other or the number of sources, in words; None: they do."""
    pairs = len(arrays["lengths"])
    if any(len(arrays[name]) != pairs for name in _BY_PAIR) or any(
        len(arrays[name]) not in (0, pairs) for name in OPTIONAL
    ):
        return "its arrays are of different numbers of pairs"
    starts, lengths = arrays["starts"], arrays["lengths"]
    if pairs and not (starts.min() >= 0 and lengths.min() >= 0 and (starts + lengths).max() == len(arrays[TOKENS])):
        return "its pairs do not end where the tokens do"
    first = np.diff(starts[:, 0])
    if (first < 0).any():
        return "its groups are not in order"
    more = np.flatnonzero(first == 0) + 1  # pairs of the group before them
    of_one_group = (lengths[:, 0], arrays["source"], arrays["row"], arrays["prompt_of"])
    if any((each[more] != each[more - 1]).any() for each in of_one_group):
        return "the pairs of a group are not of one row and prompt"
    label, is_one = arrays["label"], starts[:, 1] == starts[:, 2]
    if pairs and not PAIR <= label.min() <= label.max() <= UNJUDGED:
        return f"it has labels other than {PAIR} to {UNJUDGED}"
    if (is_one != (label >= 0)).any() or (lengths[is_one, 1] != lengths[is_one, 2]).any():
        return "its labels are not those of single answers"
    if int(arrays["source"].max(initial=-1)) >= sources:
        return "pairs are of more sources than it names"
    own = arrays["own_lengths"]
    if int(own.min(initial=1)) < 1 or int(own.sum(dtype=np.int64)) != len(arrays["own_prompts"]):
        return "the unconditional prompts are not as long as it says"
    if int(arrays["prompt_of"].max(initial=-1)) >= len(arrays["own_lengths"]):
        return "pairs have unconditional prompts that are not there"
    edges = arrays["context"].reshape(-1)
    if (np.diff(edges) < 0).any() or (len(edges) and not 0 <= edges[0] <= edges[-1] <= len(arrays[TOKENS])):
        return "the stretches of context are not in order"
    return None
