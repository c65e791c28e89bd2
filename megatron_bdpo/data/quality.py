"""What can be wrong with pairs and labelled answers and stops nothing: copies, exchanged labels, leaks, bias of length.

Exact, by digests of the parts' tokens (see ``digests``).

Nearly the same prompts are found by MinHash: 64 hashes of a prompt's shingles of 5 tokens agree in about the share of
shingles that two prompts have in common (Jaccard). What all prompts begin and end with, as a template's words, is left
out. Prompts that agree in all four hashes of one of 16 bands are in one bucket, as 99.98% of those are that have 0.8 in
common. There each is compared with the first one and with its neighbour; from 0.8 on they count, told with an error of
0.05. What it misses: the same request in other words or another language, answers, and prompts beyond those looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.digests import Digests, token_digests
from megatron_bdpo.data.labels import DESIRABLE, PAIR, UNDESIRABLE
from megatron_bdpo.data.length_bias import LabelBias, LengthBias
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import TokenArray
from megatron_bdpo.data.tokenized_rows import first_pairs
from megatron_bdpo.display import Block, Facts, Table

IntArray = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint32]

NEAR = 0.8
#: Prompts that are compared with each other, at most: 256 bytes each, and some 20 microseconds.
MOST_PROMPTS = 500_000
#: Pairs that the start of a training run looks at for leaks, at most: the other ranks wait, some 3 seconds per million.
MOST_AT_START = 1_000_000


@dataclass(frozen=True)
class Found:
    """How many there are, of how many, and where the first one is."""

    count: int
    of: int
    example: str = ""

    @property
    def share(self) -> float:
        return self.count / max(1, self.of)


@dataclass(frozen=True)
class DataQuality:
    """Of the pairs and labelled answers that are trained on, and of held-out ones where they are given.

    A labelled answer is a pair with its label in the place of another answer.

    Attributes:
        pairs: their number, of labelled answers too.
        labelled: of them, labelled answers.
        prompts: number of different ones; several pairs of one prompt are no fault.
        copies: pairs that an earlier one equals in all tokens.
        flips: pairs whose two answers another pair of the same prompt prefers the other way round, and labelled
            answers that are labelled the other way elsewhere.
        contradictions: pairs beside those of which an answer is preferred or desirable here and rejected or undesirable
            in another row of the same prompt, or the other way round. In one row's ranked answers that is as it should
            be.
        near: prompts that are nearly the same as another one, of those looked at.
        leaked_prompts: held-out pairs whose prompt is trained on; leaked_pairs: of which all tokens are.
        leaked_near: different held-out prompts, none of them trained on, that are nearly the same as one that is.
    """

    pairs: int
    labelled: int
    prompts: int
    copies: Found
    flips: Found
    contradictions: Found
    near: Found
    leaked_prompts: Found | None
    leaked_pairs: Found | None
    leaked_near: Found | None
    length: LengthBias | None
    labels: LabelBias | None

    @classmethod
    def of(
        cls, train: PairStore, held_out: PairStore | None = None, *, most_prompts: int = MOST_PROMPTS
    ) -> DataQuality:
        """Read all tokens of the stores; 24 bytes per pair stay in memory, and sorting them takes as much again."""
        prompt, chosen, rejected = _sides(train)
        pair, exchanged = _together(prompt, chosen, rejected), _together(prompt, rejected, chosen)
        preferred, refused = _together(prompt, chosen), _together(prompt, rejected)
        refused[rejected == _NO_ANSWER] = _NO_ANSWER  # which a prompt's desirable answers do not refuse
        flips = np.isin(pair, exchanged)
        groups = np.searchsorted(first_pairs(train.starts), np.arange(len(train)), side="right")
        against = np.maximum(_elsewhere(preferred, refused, groups), _elsewhere(refused, preferred, groups))
        first = np.sort(np.unique(prompt, return_index=True)[1])
        leaked_prompts = leaked_pairs = None
        other = np.zeros(0, np.int64)
        if held_out is not None:
            theirs = _sides(held_out)
            leaked_prompts = _leaked(theirs[0], prompt, held_out, train)
            leaked_pairs = _leaked(_together(*theirs), pair, held_out, train)
            other = np.sort(np.unique(theirs[0], return_index=True)[1])
            other = other[~np.isin(theirs[0][other], prompt)]
        near, leaked_near = _near(train, first, held_out, other, most_prompts)
        return cls(
            pairs=len(train),
            labelled=int((train.label != PAIR).sum()),
            prompts=len(first),
            copies=_found(_repeated(pair), train, train, functools.partial(_first_of, (pair,), (pair,))),
            flips=_found(flips, train, train, functools.partial(_first_of, (exchanged,), (pair,))),
            contradictions=_found((against >= 0) & ~flips, train, train, lambda index: int(against[index])),
            near=near,
            leaked_prompts=leaked_prompts,
            leaked_pairs=leaked_pairs,
            leaked_near=leaked_near,
            length=LengthBias.of(train),
            labels=LabelBias.of(train),
        )

    @property
    def what(self) -> str:
        """What was looked at, in words."""
        if not self.labelled:
            return "pairs"
        return "labelled answers" if self.labelled == self.pairs else "pairs and labelled answers"

    def rows(self) -> list[tuple[str, Found]]:
        """What was looked for, in words, and what was found."""
        one, several, both = _WORDS[self.what]
        named = [
            (f"copies of an earlier {one}", self.copies),
            (both, self.flips),
            ("an answer both chosen and rejected", self.contradictions if self.labelled < self.pairs else None),
            (f"prompts nearly the same (from {NEAR:.0%})", self.near),
            (f"held-out {several} whose prompt is trained on", self.leaked_prompts),
            (f"held-out {several} that are trained on", self.leaked_pairs),
            ("held-out prompts nearly trained on", self.leaked_near),
        ]
        return [(words, found) for words, found in named if found is not None]

    def length_facts(self) -> list[tuple[str, str]]:
        """The bias of length in words; ``chosen is longer`` is in ``PairStatistics`` too."""
        return [fact for bias in (self.length, self.labels) if bias for fact in bias.facts()]

    def blocks(self) -> list[Block]:
        """To be shown."""
        cells = [[words, f"{found.count:,}", f"{found.of:,}", f"{found.share:.2%}"] for words, found in self.rows()]
        table = Table(["", "number", "of", "share"], cells, title=f"quality of {self.pairs:,} {self.what}")
        examples = [(words, found.example) for words, found in self.rows() if found.example]
        told: list[Block] = ["the first of them", Facts(examples)] if examples else []
        facts = [fact for fact in self.length_facts() if fact[0] != "chosen is longer"]
        return [table, Facts([("different prompts", f"{self.prompts:,}"), *facts]), *told]

    def to_json(self) -> dict[str, Any]:
        """As an object for ``json.dump``."""
        return dataclasses.asdict(self)


#: What was looked at -> one of them, several, and two that contradict each other.
_WORDS = {
    "pairs": ("pair", "pairs", "labels exchanged in another pair"),
    "labelled answers": ("labelled answer", "answers", "answers labelled both ways"),
    "pairs and labelled answers": ("row", "rows", "labels exchanged in another row"),
}


def leak(train: PairStore, held_out: PairStore, *, most_pairs: int = MOST_AT_START) -> Found:
    """Held-out pairs whose prompt is trained on, exactly, of so many pairs of each store. Reads the prompts alone."""
    looked_at = ((store, range(min(most_pairs, len(store)))) for store in (held_out, train))
    theirs, known = (token_digests(map(store.prompt, pairs)) for store, pairs in looked_at)
    return _leaked(theirs, known, held_out, train)


# Exactly --------------------------------------------------------------------------------------------------------------


def _digests(store: PairStore) -> Digests:
    """[P, 3] of prompt, chosen and rejected."""
    parts = (part for index in range(len(store)) for part in store.pair(index).parts)
    return token_digests(parts).reshape(-1, 3)


_NO_ANSWER = np.uint64(1)  # no more likely to be that of an answer than any other


def _sides(store: PairStore) -> tuple[Digests, Digests, Digests]:
    """[P] each: prompt, chosen and rejected. A labelled answer is chosen or rejected, against what is no answer.

    So the same answer with the same label is the same pair, and with the other label the same pair exchanged.
    """
    prompt, chosen, rejected = _digests(store).T
    chosen[store.label == UNDESIRABLE] = _NO_ANSWER
    rejected[store.label == DESIRABLE] = _NO_ANSWER
    return prompt, chosen, rejected


def _together(*columns: Digests) -> Digests:
    """One digest for several, in their order, [P]."""
    result = np.zeros_like(columns[0])
    for column in columns:
        result = (result ^ column) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(32)
    return result


def _repeated(key: Digests) -> npt.NDArray[np.bool_]:
    """[P], whether an earlier one is equal."""
    repeated = np.ones(len(key), bool)
    repeated[np.unique(key, return_index=True)[1]] = False
    return repeated


def _first_of(known: Sequence[Digests], keys: Sequence[Digests], index: int) -> int:
    """The first place at which one of ``known`` is what its ``keys`` are at ``index``."""
    return int(np.flatnonzero(np.any([of == key[index] for of, key in zip(known, keys, strict=True)], axis=0))[0])


def _elsewhere(keys: Digests, known: Digests, groups: IntArray) -> IntArray:
    """[P] a place at which ``known`` is what ``keys`` are, in another group; -1: none.

    Args:
        groups: [P] of each pair.
    """
    order = np.lexsort((groups, known))
    start, stop = (np.searchsorted(known[order], keys, side) for side in ("left", "right"))
    found = np.full(len(keys), -1)
    for place in (stop - 1, start):  # of equal ones the first group and the last: one of them is another, if any is
        other = order[np.clip(place, 0, len(order) - 1)]
        is_one = (stop > start) & (groups[other] != groups)
        found[is_one] = other[is_one]
    return found


def _leaked(key: Digests, known: Digests, held_out: PairStore, train: PairStore) -> Found:
    return _found(np.isin(key, known), held_out, train, functools.partial(_first_of, (known,), (key,)))


def _found(which: npt.NDArray[np.bool_], store: PairStore, other: PairStore, original: Callable[[int], int]) -> Found:
    count = int(which.sum())
    if not count:
        return Found(0, len(which))
    index = int(np.argmax(which))
    return Found(count, len(which), f"{store.describe(index)}; see {other.describe(original(index))}")


# Nearly ---------------------------------------------------------------------------------------------------------------

_SHINGLE = 5  # tokens
_BANDS, _ROWS = 16, 4
_TOKENS = 2**16  # whose shingles are hashed at once: they fit a cache
_SEED = 20
_BLOCK = 2**16  # partners
_FEW = 100  # prompts may all be alike without a template


def _near(
    train: PairStore, first: IntArray, held_out: PairStore | None, other: IntArray, most: int
) -> tuple[Found, Found | None]:
    """Of the training prompts at ``first`` and the held-out ones at ``other``, none of them equal, so many at most."""
    rng = np.random.default_rng(_SEED)
    other = _sample(rng, other, most // 2)
    first = _sample(rng, first, most - len(other))
    prompts = [train.pair(int(index)).prompt for index in first]
    if held_out is not None:
        prompts += [held_out.pair(int(index)).prompt for index in other]
    here, there = _similar(_signatures(_without_common_ends(prompts)))
    here, there = _first_partner(here, there)
    trained = here < len(first)

    def found(which: npt.NDArray[np.bool_], store: PairStore, indices: IntArray, offset: int) -> Found:
        if not which.any():
            return Found(0, len(indices))
        example, partner = int(here[which][0]) - offset, int(there[which][0])
        where = f"{store.describe(int(indices[example]))}; see {train.describe(int(first[partner]))}"
        return Found(int(which.sum()), len(indices), where)

    near = found(trained, train, first, 0)
    return near, None if held_out is None else found(~trained & (there < len(first)), held_out, other, len(first))


def _sample(rng: np.random.Generator, indices: IntArray, most: int) -> IntArray:
    return indices if len(indices) <= most else np.sort(rng.choice(indices, most, replace=False))


def _without_common_ends(prompts: list[TokenArray]) -> list[TokenArray]:
    """Without what all of them begin with, and then what all of them end with; a few of them stay as they are."""
    if len(prompts) < _FEW:
        return prompts
    start = _common(prompts)
    prompts = [prompt[start:] for prompt in prompts]
    end = _common([prompt[::-1] for prompt in prompts])
    return [prompt[: len(prompt) - end] for prompt in prompts]


def _common(prompts: list[TokenArray]) -> int:
    """How many tokens all of them begin with."""
    longest = prompts[0]
    for prompt in prompts:
        size = min(len(longest), len(prompt))
        differs = longest[:size] != prompt[:size]
        longest = longest[: int(differs.argmax()) if differs.any() else size]
        if not len(longest):
            break
    return len(longest)


def _signatures(prompts: list[TokenArray]) -> Signatures:
    """[n, hashes] of each prompt's shingles the least, under several hash functions."""
    rng = np.random.default_rng(_SEED)
    factors = rng.integers(2**31, size=_BANDS * _ROWS, dtype=np.uint32) * 2 + 1
    summands = rng.integers(2**32, size=_BANDS * _ROWS, dtype=np.uint32)
    signatures = np.empty((len(prompts), _BANDS * _ROWS), np.uint32)
    for start, stop in _some_tokens(prompts):
        shingles, starts = _shingles(prompts[start:stop])
        for column, (factor, summand) in enumerate(zip(factors, summands, strict=True)):
            signatures[start:stop, column] = np.minimum.reduceat(shingles * factor + summand, starts)
    return signatures


def _some_tokens(prompts: list[TokenArray]) -> Iterator[tuple[int, int]]:
    ends = np.cumsum([len(prompt) for prompt in prompts])
    start = 0
    while start < len(prompts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _TOKENS, side="right")))
        yield start, stop
        start = stop


def _shingles(prompts: list[TokenArray]) -> tuple[npt.NDArray[np.uint32], IntArray]:
    """Hashes of all runs of five tokens, prompt after prompt, and where each begins. Its end has five blanks."""
    blanks = np.full(_SHINGLE, -1, np.int32)
    laid = np.concatenate([part for prompt in prompts for part in (prompt, blanks)])
    tokens = _mixed(laid.astype(np.uint32).astype(np.uint64))
    windows = np.zeros(len(tokens) - _SHINGLE + 1, np.uint64)
    for place in range(_SHINGLE):
        windows = windows * np.uint64(0xD6E8FEB86659FD93) + tokens[place : place + len(windows)]
    lengths = np.array([len(prompt) for prompt in prompts])
    own = np.concatenate([np.arange(size + 1) for size in lengths])  # windows that begin within the prompt or behind it
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    at = own + np.repeat(np.cumsum(lengths + _SHINGLE) - (lengths + _SHINGLE), lengths + 1)
    return (_mixed(windows[at]) >> np.uint64(32)).astype(np.uint32), starts


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Other numbers, each by itself, that look random (murmur3's last step)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def _similar(signatures: Signatures) -> tuple[IntArray, IntArray]:
    """Places (here, there), there before here, whose signatures agree enough."""
    prompts = len(signatures)
    pairs = [np.zeros(0, np.int64)]
    for band in range(_BANDS):
        key = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS]).view(np.uint64)
        bucket = _together(key[:, 0], key[:, 1])
        order = np.argsort(bucket, kind="stable")
        begins = np.ones(len(order), bool)
        begins[1:] = bucket[order[1:]] != bucket[order[:-1]]
        place = np.arange(len(order))
        first = order[np.maximum.accumulate(np.where(begins, place, 0))]
        rest = ~begins
        before = np.concatenate([order[:1], order[:-1]])
        pairs += [order[rest] * prompts + first[rest], order[rest] * prompts + before[rest]]
    here, there = np.divmod(np.unique(np.concatenate(pairs)), max(1, prompts))
    agree = np.concatenate(
        [
            (signatures[here[start : start + _BLOCK]] == signatures[there[start : start + _BLOCK]]).mean(axis=1)
            for start in range(0, len(here), _BLOCK)
        ]
        or [np.zeros(0)]
    )
    return here[agree >= NEAR], there[agree >= NEAR]


def _first_partner(here: IntArray, there: IntArray) -> tuple[IntArray, IntArray]:
    """Each place once, with the first of those that it is similar to."""
    places, index = np.unique(here, return_index=True)  # both are sorted, by here and then by there
    return places, there[index]
