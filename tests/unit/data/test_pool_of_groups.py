"""A pool of groups answers as its pairs would, one by one."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.pool import PairPool, by_source
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.selection import Selection, drop_long
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
from megatron_bdpo.data.tokenization import PairTokens
from megatron_bdpo.data.tokenized_rows import RowsBuilder
from megatron_bdpo.errors import UserError
from tests.unit.data.test_groups import ids, mask


@dataclasses.dataclass
class Naive:
    """A pair by itself."""

    store: int
    source: int
    group: tuple[Any, ...]
    pair: PairTokens
    own_prompt: Any
    record: PreferenceRecord
    row: int

    def swapped(self) -> Naive:
        chosen, rejected = self.pair.parts[1:]
        pair = PairTokens(self.pair.prompt, rejected, chosen, *self.pair.scored[::-1])
        safe = {"chosen_safe": self.record.rejected_safe, "rejected_safe": self.record.chosen_safe}
        return dataclasses.replace(
            self, pair=pair, record=dataclasses.replace(self.record, reference=self.record.reference[::-1], **safe)
        )

    @property
    def sides(self) -> list[tuple[list[int], list[bool]]]:
        every = [np.ones(len(tokens), bool) for tokens in self.pair.parts[1:]]
        masks = [whole if mask is None else mask for mask, whole in zip(self.pair.scored, every, strict=True)]
        return [(tokens.tolist(), mask.tolist()) for tokens, mask in zip(self.pair.parts[1:], masks, strict=True)]


def drawn(rng: np.random.Generator, store: int, *, singles: bool) -> list[Naive]:
    """The pairs of some rows of two sources."""
    pairs = []
    for row in range(int(rng.integers(1, 6))):
        source, own = row % 2, ids(*rng.integers(9, size=rng.integers(1, 9))) if rng.random() < 0.5 else None
        prompt = ids(*rng.integers(9, size=rng.integers(1, 4)))
        answers = [(ids(number, *rng.integers(9, size=rng.integers(0, 4))), None) for number in range(4)]
        if rng.random() < 0.5:
            answers[0] = (ids(0, 1, 2), mask("x-x"))
        compared = [(a, b) for a in range(4) for b in range(4) if a != b]
        for a, b in rng.permutation(compared)[: 1 if singles else rng.integers(1, 7)].tolist():
            (chosen, first), (rejected, second) = answers[a], answers[b]
            labels = [bool(rng.integers(2)), bool(rng.integers(2))]
            record = PreferenceRecord(
                "", "", "", *labels, reference=(-rng.random(), -rng.random()), margin=rng.random()
            )
            pair = PairTokens(prompt, chosen, rejected, first, second)
            pairs.append(Naive(store, source, (store, row), pair, own, record, row + 1))
    return sorted(pairs, key=lambda each: each.source)


def store_of(directory: Path, pairs: list[Naive]) -> PairStore:
    directory.mkdir(parents=True)
    sources = SourceSpec("a"), SourceSpec("b", 0.5)
    with PairStoreWriter(directory) as writer:
        for source in (0, 1):
            builder = RowsBuilder()
            for each in pairs:
                if each.source == source:
                    builder.append(each.pair, each.row, each.record, each.own_prompt)
            writer.extend(builder.finish(), source)
        writer.finish(StoreInfo("0", {}, [7, 7], sources, DataReport(["a", "b"])))
    return PairStore.open(directory)


@pytest.mark.parametrize("seed", range(24))
def test_a_pool_is_its_pairs(tmp_path: Path, seed: int) -> None:
    """Whatever is asked of groups, answered from pairs one by one: of two stores, with pairs swapped and left out."""
    rng = np.random.default_rng(seed)
    of_stores = [drawn(rng, index, singles=seed % 4 == 0) for index in (0, 1)]
    pool = PairPool([store_of(tmp_path / str(index), pairs) for index, pairs in enumerate(of_stores)])
    pairs = [*itertools.chain.from_iterable(of_stores)]
    swapped, left_out = np.flatnonzero(rng.random(len(pairs)) < 0.3), np.flatnonzero(rng.random(len(pairs)) < 0.2)
    pool.pairs.swap(swapped)
    pool.grouping.kept[left_out] = False
    pairs = [each.swapped() if place in swapped else each for place, each in enumerate(pairs)]
    groups = list(dict.fromkeys(each.group for each in pairs))
    assert len(pool.grouping) == len(groups)
    of_group = [
        [place for place, each in enumerate(pairs) if each.group == group and place not in left_out] for group in groups
    ]

    assert pool.grouping.groups_of(np.arange(len(pairs))).tolist() == [groups.index(each.group) for each in pairs]
    some = rng.integers(len(groups), size=7)
    found, places = pool.grouping.pairs_and_places(some)
    assert found.tolist() == [pair for group in some for pair in of_group[group]]
    assert places.tolist() == [place for place, group in enumerate(some) for _ in of_group[group]]

    for place, each in enumerate(pairs):
        assert (
            tuple(pool.pairs.reference()[place]) == each.record.reference
            and pool.pairs.margins()[place] == each.record.margin
        )
        assert pool.pairs.unsafe[place].tolist() == [not each.record.chosen_safe, not each.record.rejected_safe]
        assert pool.pairs.scored[place].tolist() == [sum(mask) for _, mask in each.sides]
        assert pool.pairs.lengths[place].tolist() == [len(part) for part in each.pair.parts]

    lengths, expected = pool.group_lengths(some), []
    for group, compared in enumerate(of_group):
        if not compared:
            expected.append((0, 0, 0, 0))
            continue
        first = pairs[compared[0]]
        laid_out, empty = pool.group(group), pool.group(group, PromptKind.EMPTY)
        assert laid_out.pairs.tolist() == compared and laid_out.group.prompt.tolist() == first.pair.prompt.tolist()
        unconditional = [7, 7] if first.own_prompt is None else first.own_prompt.tolist()
        assert empty.group.prompt.tolist() == unconditional and np.array_equal(empty.answers, laid_out.answers)
        answers = [
            (tokens.tolist(), (np.ones(len(tokens), bool) if scored is None else scored).tolist())
            for tokens, scored in zip(laid_out.group.answers, laid_out.group.scored, strict=True)
        ]
        assert len(answers) == len({json.dumps(each) for each in answers}), "each once"
        for pair, named in zip(compared, laid_out.answers.tolist(), strict=True):
            assert [answers[answer] for answer in named] == pairs[pair].sides
        tokens = [len(tokens) for tokens, _ in answers]
        expected.append((len(laid_out.group.prompt), len(unconditional), sum(tokens), len(tokens)))
        for share in (True, False):
            copies = 1 if share else len(tokens)
            longer = max(expected[-1][:2])
            assert pool.sizes(share_prompts=share)[group] == longer * copies + sum(tokens)
    with_pairs = [place for place, group in enumerate(some) if of_group[group] and seed % 4]
    assert lengths.answer_tokens[with_pairs].tolist() == [expected[some[place]][2] for place in with_pairs]
    assert lengths.answers[with_pairs].tolist() == [expected[some[place]][3] for place in with_pairs]
    assert lengths.prompt.tolist() == [len(pairs[pool.grouping.first_pair[group]].pair.prompt) for group in some]

    for index in (0, 1):
        own = pool.grouping.of_store(index)
        assert [groups[group][0] for group in own] == [index] * len(own)
        for source, (of_source, weight) in enumerate(by_source(pool, index, own)):
            assert weight == (1.0, 0.5)[source]
            assert of_source.tolist() == [g for g in own if pairs[pool.grouping.first_pair[g]].source == source]


def test_answers_of_different_stores_are_never_one(tmp_path: Path) -> None:
    """Although they begin at the same place, each in its own tokens."""
    stores = []
    for index, (prompt, first) in enumerate(((ids(1), ids(2, 3)), (ids(1, 2, 3), ids(4)))):
        builder = RowsBuilder()
        for chosen, rejected in ((first, ids(5)), (ids(5), first)):
            builder.append(PairTokens(prompt, chosen, rejected), 1, PreferenceRecord("", "", ""))
        stores.append(store_of_rows(tmp_path / str(index), builder))
    pool = PairPool(stores)
    assert stores[0].starts[0, 2] == stores[1].starts[0, 1] == 3
    assert pool.group_lengths(np.arange(2)).answers.tolist() == [2, 2]
    assert pool.sizes(share_prompts=True).tolist() == [4 + 1, 5]


def store_of_rows(directory: Path, builder: RowsBuilder) -> PairStore:
    directory.mkdir()
    with PairStoreWriter(directory) as writer:
        writer.extend(builder.finish(), 0)
        writer.finish(StoreInfo("0", {}, [7, 7], (SourceSpec("a"),), DataReport(["a"])))
    return PairStore.open(directory)


def test_groups_are_dropped_whole(tmp_path: Path) -> None:
    pool = PairPool([store_of(tmp_path / "store", drawn(np.random.default_rng(3), 0, singles=False))])
    sizes = pool.sizes(share_prompts=True)
    selection, longest = Selection(np.arange(len(pool.grouping))), int(sizes.max())
    dropped = len(pool.grouping.pairs_of(np.flatnonzero(sizes == longest)))
    assert dropped > (sizes == longest).sum(), "of several pairs each"
    with pytest.raises(UserError, match=f"{dropped} of {len(pool)} pairs do not fit .*takes {longest} positions"):
        drop_long(pool, selection, sizes, longest - 1, drop=False)
    drop_long(pool, selection, sizes, longest - 1, drop=True)
    assert selection.notes == [f"{dropped} pairs longer than --seq-length {longest - 1} dropped"]
    assert selection.ids.tolist() == np.flatnonzero(sizes < longest).tolist()
