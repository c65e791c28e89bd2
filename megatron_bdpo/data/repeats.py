"""Pairs that say what an earlier pair has said, or the opposite, by their texts: no tokenizer is needed.

What differs in a character is different. ``quality`` compares tokens, and finds prompts that are nearly the same.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.messages import Message
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.sources import SourceSpec, describe_row

type Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Repeated:
    """How many pairs there are of a kind, and where the first one is."""

    count: int = 0
    example: str = ""
    earlier: str = ""
    """Where the pair is that the example repeats."""


@dataclass(frozen=True)
class Found:
    """What was found among the pairs that were seen."""

    copies: Repeated
    """Pairs with the prompt and the answers of an earlier one."""
    exchanged: Repeated
    """Pairs that prefer what an earlier one, of the same prompt, rejects, and the other way round."""

    def lines(self) -> list[str]:
        """What to say of them; nothing where there are none."""
        told = {
            "copies of an earlier pair": self.copies,
            "with the answers of an earlier pair exchanged: they contradict each other": self.exchanged,
        }
        return [
            f"  {each.count:,} {what} ({each.example}; see {each.earlier})" for what, each in told.items() if each.count
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)


class Repeats:
    """Keeps 18 bytes of each pair that it sees, and compares all of them at the end."""

    def __init__(self, sources: Sequence[SourceSpec]) -> None:
        """
        Args:
            sources: that rows come from.
        """
        self._sources = sources
        # Of pairs in the order in which they came. The digest's last bit tells which of two answers is the chosen one:
        # the others are of the prompt and the answers, whichever is chosen.
        self._digests, self._source_of, self._row_of = array("Q"), array("H"), array("q")

    def see(self, source: int, row: int, record: PreferenceRecord) -> None:
        """Take in a pair.

        Args:
            source: index of the source that it comes from.
            row: its number there.
        """
        prompt, chosen, rejected = map(_digest, (record.prompt, record.chosen, record.rejected))
        answers = chosen + rejected if chosen < rejected else rejected + chosen
        digest = int.from_bytes(blake2b(prompt + answers, digest_size=8).digest())
        self._digests.append(digest & ~1 | (chosen < rejected))
        self._source_of.append(source)
        self._row_of.append(row)

    def found(self) -> Found:
        """Among all pairs that were seen."""
        digests = np.array(self._digests, np.uint64)
        some, group = _of_groups(digests >> np.uint64(1))
        if not len(some):
            return Found(Repeated(), Repeated())
        kind = (digests[some] & np.uint64(1)).astype(np.int64)
        first = np.full((2, int(group.max()) + 1), len(digests))  # where each kind of a group comes first
        np.minimum.at(first, (kind, group), some)
        return Found(*(self._told(some, first[of, group]) for of in (kind, 1 - kind)))

    def _told(self, places: Places, earlier: Places) -> Repeated:
        """Of pairs, and where the pair is that each would repeat if it came after that."""
        repeated = np.flatnonzero(places > earlier)
        if not len(repeated):
            return Repeated()
        return Repeated(len(repeated), self._where(places[repeated[0]]), self._where(earlier[repeated[0]]))

    def _where(self, place: int) -> str:
        return describe_row(self._sources[self._source_of[place]], self._row_of[place])


def _of_groups(digests: npt.NDArray[np.uint64]) -> tuple[Places, Places]:
    """Of the digests that come more than once: their places in order, and numbers that equal ones share."""
    ordered = np.sort(digests)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(several):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    group = np.minimum(np.searchsorted(several, digests), len(several) - 1)
    some = np.flatnonzero(several[group] == digests)
    return some, group[some]


def _digest(text: str | list[Message]) -> bytes:
    """64 bits: of n texts two share them by chance with a probability of n^2 / 2^65."""
    spelled = f'"{text}' if isinstance(text, str) else _spell(text)
    return blake2b(spelled.encode("utf-8", "surrogatepass"), digest_size=8).digest()


_spell = json.JSONEncoder(sort_keys=True).encode
