"""Bin packing: of steps, and of pairs without steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data import bin_packing
from megatron_bdpo.data.bin_packing import (
    best_fit,
    cut_into_blocks,
    emptiest_first,
    pack_all,
    pack_evenly,
    per_pack,
    shortest,
)

# Steps


@given(st.lists(st.lists(st.integers(1, 50), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_steps_are_packed_no_worse_than_the_quick_way(sizes, packs):
    step_sizes = np.array(sizes)
    found = shortest(step_sizes, packs, limit=10**6, grain=4)
    assert ((found >= 0) & (found < packs)).all()
    quick = per_pack(step_sizes, emptiest_first(step_sizes, packs), packs)
    longest = per_pack(step_sizes, found, packs).max(axis=1)
    assert (-(-longest // 4) <= -(-quick.max(axis=1) // 4)).all()


def test_best_fit_finds_what_the_emptiest_pack_misses():
    sizes = np.array([[5, 5, 4, 4, 3, 3, 3]])  # 27 = 3 x 9
    assert per_pack(sizes, emptiest_first(sizes, 3), 3).max() == 11
    assert per_pack(sizes, shortest(sizes, 3, limit=100, grain=1), 3).max() == 9


@given(st.lists(st.integers(20, 60), min_size=12, max_size=12), st.integers(4, 7), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_what_best_fit_gets_below_the_limit_is_below_it(sizes, packs, grain):
    step_sizes = np.array([sizes])
    _, fits = best_fit(step_sizes, packs, np.array([100]))
    found = shortest(step_sizes, packs, limit=100, grain=grain)
    assert not fits[0] or per_pack(step_sizes, found, packs).max() <= 100


def test_best_fit_says_which_steps_have_no_room():
    pack_of, fits = best_fit(np.array([[6, 5, 4, 3], [9, 9, 2, 1]]), 2, np.array([9, 10]))
    assert fits.tolist() == [True, False]
    assert per_pack(np.array([[6, 5, 4, 3]]), pack_of[:1], 2).tolist() == [[9, 9]]


def test_best_fit_leaves_no_rank_without_pairs():
    _, fits = best_fit(np.array([[3, 2, 1]]), 2, np.array([6]), ranks=2)
    assert not fits.any()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_steps_packed_in_blocks_are_those_packed_at_once(steps, pairs, packs, block):
    sizes = np.random.default_rng(steps).integers(1, 50, (steps, pairs))
    at_once = shortest(sizes, packs, limit=60, grain=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bin_packing, "_BLOCK", block)
        assert (shortest(sizes, packs, limit=60, grain=4) == at_once).all()
        expected = [[int(sizes[b][at_once[b] == k].sum()) for k in range(packs)] for b in range(steps)]
        assert per_pack(sizes, at_once, packs).tolist() == expected


def test_sums_of_packs_are_of_64_bits():
    """Costs of attention are squares of lengths: of two pairs of 131,072 tokens, 2^35."""
    costs, pairs = np.array([2**34, 7, 2**34]), np.array([[0, 2], [1, 0]])
    sums = per_pack(costs, np.array([[1, 1], [0, 1]], np.int32), 2, pairs)
    assert sums.dtype == np.int64 and sums.tolist() == [[0, 2**35], [7, 2**34]]


# Pairs without steps


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 4), st.integers(50, 120))
@settings(max_examples=80, deadline=None)
def test_pack_all_places_every_pair_once(sizes, multiple, length):
    ids = np.arange(len(sizes)) + 100
    packs = pack_all(ids, np.array(sizes, np.int64), length, multiple)
    assert len(packs) % multiple == 0
    assert sorted(np.concatenate([*packs, []])) == list(ids)
    assert all(sum(sizes[pair - 100] for pair in pack) <= length for pack in packs)
    # Two packs at most half full would have been one.
    half_empty = [pack for pack in packs if len(pack) and sum(sizes[pair - 100] for pair in pack) * 2 <= length]
    assert len(half_empty) <= 1


def test_pack_all_takes_the_tightest_room():
    packs = pack_all(np.arange(4), np.array([60, 70, 30, 40]), 100, 1)
    assert sorted(sorted(pack.tolist()) for pack in packs) == [[0, 3], [1, 2]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_pack_evenly_makes_packs_of_one_length_as_short_as_their_fullest(sizes, multiple):
    ids, array = np.arange(len(sizes)), np.array(sizes, np.int64)
    packs, length = pack_evenly(ids, array, 96, multiple, 8)
    assert len(packs) == len(pack_all(ids, array, 96, multiple))
    assert sorted(np.concatenate([*packs, []])) == list(ids)
    fullest = max((int(array[pack].sum()) for pack in packs), default=0)
    assert fullest <= length <= 96
    assert length in (96, -(-fullest // 8) * 8)


@given(st.lists(st.integers(1, 150), max_size=80), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_blocks_are_pairs_in_their_order_and_fill_their_packs(sizes, packs):
    array, length = np.array(sizes, np.int64), 100
    blocks = list(cut_into_blocks(array, length, packs))
    assert [place for block in blocks for place in range(block.start, block.stop)] == list(range(len(sizes)))
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        own = array[block]
        limit = max(length, int(own[0]))
        assert own.max() <= limit
        assert len(pack_all(np.arange(len(own)), own, limit, 1)) <= packs
        if after is not None and array[after.start] <= limit:  # a good deal is in it
            assert own.sum() + array[after.start] > packs * limit / 2


@given(st.lists(st.integers(1, 150), min_size=1, max_size=80), st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_blocks_do_not_depend_on_where_one_begins(sizes, packs, data):
    """What goes on after some blocks cuts the same ones."""
    array = np.array(sizes, np.int64)
    blocks = list(cut_into_blocks(array, 100, packs))
    first = data.draw(st.integers(0, len(blocks) - 1))
    begin = blocks[first].start
    again = [slice(begin + b.start, begin + b.stop) for b in cut_into_blocks(array[begin:], 100, packs)]
    assert again == blocks[first:]
