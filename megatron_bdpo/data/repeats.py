"""Pairs that say what an earlier pair has said, or the opposite, by their texts: no tokenizer is needed.

What differs in a character is different. ``quality`` compares tokens, and finds prompts that are nearly the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from megatron_bdpo.data.messages import Message
from megatron_bdpo.data.records import PreferenceRecord


@dataclass
class Repeated:
    """How many pairs there are of a kind, and where the first one is."""

    count: int = 0
    example: str = ""
    earlier: str = ""
    """Where the pair is that the example repeats."""

    def add(self, where: str, earlier: str) -> None:
        """Count one."""
        if not self.count:
            self.example, self.earlier = where, earlier
        self.count += 1


@dataclass
class Repeats:
    """What was found among the pairs that were seen."""

    copies: Repeated = field(default_factory=Repeated)
    """Pairs with the prompt and the answers of an earlier one."""
    exchanged: Repeated = field(default_factory=Repeated)
    """Pairs that prefer what an earlier one, of the same prompt, rejects, and the other way round."""
    _seen: dict[bytes, str] = field(default_factory=dict)

    def see(self, where: str, record: PreferenceRecord) -> None:
        """Compare a pair with those before it.

        Args:
            where: it is, for messages.
        """
        prompt, chosen, rejected = map(_digest, (record.prompt, record.chosen, record.rejected))
        if earlier := self._seen.get(prompt + rejected + chosen):
            self.exchanged.add(where, earlier)
        if earlier := self._seen.get(prompt + chosen + rejected):
            self.copies.add(where, earlier)
        else:
            self._seen[prompt + chosen + rejected] = where

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
        return {"copies": asdict(self.copies), "exchanged": asdict(self.exchanged)}


def _digest(text: str | list[Message]) -> bytes:
    """64 bits: of n texts two share them by chance with a probability of n^2 / 2^65."""
    return blake2b(json.dumps(text, sort_keys=True).encode(), digest_size=8).digest()
