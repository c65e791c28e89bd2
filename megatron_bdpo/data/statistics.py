"""What the lengths and labels of tokenized rows say about the flags of a training run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bdpo.data.labels import DESIRABLE, PAIR, UNDESIRABLE
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenized_rows import SAFE, UNKNOWN, UNSAFE
from megatron_bdpo.display import Block, Facts, Table

_PACK_LENGTHS = tuple(2**exponent for exponent in range(9, 18))  # 512 to 131,072 positions
_SHARES = (50, 95, 99, 100)


@dataclass(frozen=True)
class PairStatistics:
    """Of all pairs and labelled answers of a store. Positions are those of a pack that shares prompts: a prompt and its
    answers once.

    Attributes:
        pairs: their number, of labelled answers too.
        desirable, undesirable: of them, labelled answers.
        groups: what packs and steps are made of: the pairs of one row and prompt. Most rows give one pair.
        answers: of all groups, each once in its own.
        mean_positions: per group; what ``megatron-bdpo plan --tokens-per-pair`` asks for.
        positions: percentile -> positions of a group.
        too_long: pack length (``--seq-length``) -> groups that do not fit one, up to the first length that fits all.
        chosen_longer: share of pairs whose chosen response has more tokens than the rejected one; None: no pairs.
        length_difference: mean of chosen minus rejected, in tokens; None: no pairs.
        labels: (chosen, rejected) safety in words -> pairs; empty where no pair has a label.
        shared_prompt_saving: share of a training's tokens that encoding each prompt once saves.
    """

    pairs: int
    groups: int
    answers: int
    mean_positions: float
    positions: dict[int, int]
    too_long: dict[int, int]
    chosen_longer: float | None
    length_difference: float | None
    labels: dict[str, int]
    shared_prompt_saving: float
    desirable: int
    undesirable: int

    @classmethod
    def of(cls, store: PairStore) -> PairStatistics:
        """Read the lengths and labels of a store; its tokens are not touched."""
        pool = PairPool([store])
        groups = pool.group_lengths(np.arange(len(pool.grouping)))
        positions, separate = (groups.positions(share_prompts=share) for share in (True, False))
        too_long: dict[int, int] = {}
        for length in _PACK_LENGTHS:
            too_long[length] = int((positions > length).sum())
            if not too_long[length]:
                break
        of_pairs = store.lengths[store.label == PAIR, 1:].astype(np.int64)
        difference = of_pairs[:, 0] - of_pairs[:, 1]
        return cls(
            pairs=len(store),
            groups=len(pool.grouping),
            answers=int(groups.answers.sum()),
            mean_positions=float(positions.mean()),
            positions={share: int(np.percentile(positions, share, method="higher")) for share in _SHARES},
            too_long=too_long,
            chosen_longer=float((difference > 0).mean()) if len(difference) else None,
            length_difference=float(difference.mean()) if len(difference) else None,
            labels=_labels(store),
            shared_prompt_saving=float(1 - positions.sum() / separate.sum()),
            desirable=int((store.label == DESIRABLE).sum()),
            undesirable=int((store.label == UNDESIRABLE).sum()),
        )

    @property
    def labelled(self) -> int:
        """Number of labelled answers."""
        return self.desirable + self.undesirable

    @property
    def unit(self) -> str:
        """What packs and steps are made of, in words."""
        if self.groups < self.pairs:
            return "group"
        return "answer" if self.labelled == self.pairs else "row" if self.labelled else "pair"

    def blocks(self) -> list[Block]:
        """To be shown."""
        of, unit = {50: "median", 95: "95 %", 99: "99 %", 100: "largest"}, self.unit
        facts = []
        if self.groups < self.pairs:
            facts.append(("groups", f"{self.groups:,}, of {self.answers:,} answers in {self.pairs:,} pairs"))
        facts += [
            (
                f"positions of {'an' if unit == 'answer' else 'a'} {unit}",
                f"mean {self.mean_positions:.1f}, "
                + ", ".join(f"{of[share]} {value:,}" for share, value in self.positions.items()),
            ),
            ("shared prompts", f"{self.shared_prompt_saving:.1%} fewer tokens than one prompt per answer"),
        ]
        if self.chosen_longer is not None:
            told = f"in {self.chosen_longer:.1%} of the pairs, by {self.length_difference:+.1f} tokens on average"
            facts.append(("chosen is longer", told))
        too_long = [
            [f"{length:,}", f"{count:,}", f"{count / self.groups:.2%}"] for length, count in self.too_long.items()
        ]
        blocks: list[Block] = [
            Facts(facts, indent=0),
            Table(["--seq-length", f"{unit}s", "share"], too_long, left=(), title=f"{unit}s that do not fit a pack"),
        ]
        if self.labels:
            labels = [[words, f"{count:,}"] for words, count in self.labels.items()]
            blocks.append(Table(["chosen, rejected", "pairs"], labels, title="safety labels"))
        return blocks

    def to_json(self) -> dict[str, Any]:
        """As an object for ``json.dump``."""
        return dataclasses.asdict(self)


def _labels(store: PairStore) -> dict[str, int]:
    words = {SAFE: "safe", UNSAFE: "unsafe", UNKNOWN: "unknown"}
    kinds, counts = np.unique(store.unsafe, axis=0, return_counts=True)
    labels = {
        f"{words[int(chosen)]}, {words[int(rejected)]}": int(count)
        for (chosen, rejected), count in zip(kinds, counts, strict=True)
    }
    return {} if set(labels) == {"unknown, unknown"} else labels
