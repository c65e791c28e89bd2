"""Rows that say what an earlier one has said, or the opposite, by their texts: no tokenizer is needed.

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
    """How many rows there are of a kind, and where the first one is."""

    count: int = 0
    example: str = ""
    earlier: str = ""
    """Where the row is that the example repeats."""


@dataclass(frozen=True)
class Found:
    """What was found among the pairs and labelled answers that were seen."""

    copies: Repeated = Repeated()
    """Pairs with the prompt and the answers of an earlier one."""
    exchanged: Repeated = Repeated()
    """Pairs that prefer what an earlier one, of the same prompt, rejects, and the other way round."""
    labelled_copies: Repeated = Repeated()
    """Labelled answers with the prompt, the answer and the label of an earlier one."""
    labelled_both_ways: Repeated = Repeated()
    """Labelled answers with the prompt and the answer of an earlier one, and the other label."""

    def lines(self) -> list[str]:
        """What to say of them; nothing where there are none."""
        told = {
            "copies of an earlier pair": self.copies,
            "with the answers of an earlier pair exchanged: they contradict each other": self.exchanged,
            "copies of an earlier labelled answer": self.labelled_copies,
            "labelled the other way than an earlier copy: they contradict each other": self.labelled_both_ways,
        }
        return [
            f"  {each.count:,} {what} ({each.example}; see {each.earlier})" for what, each in told.items() if each.count
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)


class Repeats:
    """Keeps 19 bytes of each row that it sees, and compares all of them at the end."""

    def __init__(self, sources: Sequence[SourceSpec]) -> None:
        """
        Args:
            sources: that rows come from.
        """
        self._sources = sources
        # Of rows in the order in which they came. The digest's last bit tells which of two answers is the chosen one,
        # or the label of a single one: the others are of the prompt and the answers, whichever is chosen.
        self._digests, self._source_of, self._row_of = array("Q"), array("H"), array("q")
        self._is_labelled = array("b")

    def see(self, source: int, row: int, record: PreferenceRecord) -> None:
        """Take in a pair or a labelled answer.

        Args:
            source: index of the source that it comes from.
            row: its number there.
        """
        prompt, chosen, rejected = map(_digest, (record.prompt, record.chosen, record.rejected))
        answers = chosen + rejected if chosen < rejected else rejected + chosen
        digest = int.from_bytes(blake2b(prompt + answers, digest_size=8).digest())
        self._digests.append(digest & ~1 | (chosen < rejected if record.label is None else record.label))
        self._is_labelled.append(record.label is not None)
        self._source_of.append(source)
        self._row_of.append(row)

    def found(self) -> Found:
        """Among all rows that were seen."""
        digests = np.array(self._digests, np.uint64)
        some, group = _of_groups(digests >> np.uint64(1))
        if not len(some):
            return Found()
        kind = (digests[some] & np.uint64(1)).astype(np.int64)
        first = np.full((2, int(group.max()) + 1), len(digests))  # where each kind of a group comes first
        np.minimum.at(first, (kind, group), some)
        labelled = np.array(self._is_labelled, bool)[some]
        return Found(
            *(
                self._told(some[which], first[of, group][which])
                for which in (~labelled, labelled)
                for of in (kind, 1 - kind)
            )
        )

    def _told(self, places: Places, earlier: Places) -> Repeated:
        """Of rows, and where the row is that each would repeat if it came after that."""
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
