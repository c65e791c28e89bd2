"""Packs against a definition in words: every token is (pair, segment, position), and that says whom it may see."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.packs import Pack, PairGroup, group_tokens, lay_out

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"


class Token(NamedTuple):
    """One place of a pack."""

    pair: int
    segment: str
    position: int
    copy: str = ""  # which branch a prompt belongs to, where each branch has its own


def group(pair_id: int, prompt: int, chosen: int, rejected: int, first_token: int = 1) -> PairGroup:
    """A pair with these lengths and all tokens different."""
    tokens = np.arange(first_token, first_token + prompt + chosen + rejected, dtype=np.int32)
    return PairGroup(pair_id, *np.split(tokens, [prompt, prompt + chosen]))


@st.composite
def group_lists(draw) -> list[PairGroup]:
    length = st.integers(1, 5)
    lengths = draw(st.lists(st.tuples(length, length, length), max_size=4))
    return [group(7 + i, *each, first_token=1 + 20 * i) for i, each in enumerate(lengths)]


def token_count(groups: list[PairGroup], share: bool) -> int:
    lengths = np.array([[len(g.prompt), len(g.chosen), len(g.rejected)] for g in groups]).reshape(-1, 3)
    return int(group_tokens(lengths, share_prompts=share).sum())


def expected_tokens(groups: list[PairGroup], share: bool) -> list[tuple[Token, int]]:
    """Every token of the pack in order, with its id."""
    listed = []
    for each in groups:
        branches = [(CHOSEN, each.chosen), (REJECTED, each.rejected)]
        for copy in [""] if share else [CHOSEN, REJECTED]:
            listed += [(Token(each.pair_id, PROMPT, i, copy), token) for i, token in enumerate(each.prompt)]
            for segment, response in branches:
                if copy in ("", segment):
                    first = len(each.prompt)
                    listed += [(Token(each.pair_id, segment, first + i, copy), t) for i, t in enumerate(response)]
    return listed


def may_see(query: Token, key: Token) -> bool:
    """Its own past: the prompt before it and its own branch, of its own pair."""
    same_branch = key.segment in (PROMPT, query.segment) and key.copy == query.copy
    return key.pair == query.pair and same_branch and key.position <= query.position


def seen_by(pack: Pack) -> list[list[int]]:
    """What the runs say: for every used position the pack indices it attends to, in order."""
    seen, key_start = [], 0
    for queries, keys in zip(pack.query_lengths, pack.key_lengths, strict=True):
        gathered = pack.key_index[key_start : key_start + keys]
        seen += [gathered[: keys - queries + i + 1].tolist() for i in range(queries)]  # bottom-right causal
        key_start += keys
    assert key_start == len(pack.key_index)
    return seen


@given(group_lists(), st.booleans(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_token_sees_its_own_past_and_nothing_else(groups, share, padding):
    used = token_count(groups, share)
    pack = lay_out(groups, used + padding, share_prompts=share)
    tokens = expected_tokens(groups, share)
    assert pack.used == len(tokens) == used
    assert pack.tokens[:used].tolist() == [token_id for _, token_id in tokens]
    assert pack.positions[:used].tolist() == [token.position for token, _ in tokens]
    expected_seen = [[i for i, (key, _) in enumerate(tokens) if may_see(query, key)] for query, _ in tokens]
    assert seen_by(pack) == expected_seen
    assert not pack.tokens[used:].any()
    assert not pack.positions[used:].any()


@given(group_lists(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_response_token_is_scored_from_the_token_before_it(groups, share):
    pack = lay_out(groups, token_count(groups, share), share_prompts=share)
    place = {token: index for index, (token, _) in enumerate(expected_tokens(groups, share))}
    expected_scored = []
    for pair, each in enumerate(groups):
        for branch, segment, response in ((0, CHOSEN, each.chosen), (1, REJECTED, each.rejected)):
            copy = "" if share else segment
            for i, target in enumerate(response):
                position = len(each.prompt) + i - 1
                before = Token(each.pair_id, segment if i else PROMPT, position, copy)
                expected_scored.append((place[before], int(target), 2 * pair + branch))
    scored = zip(pack.scored_hidden.tolist(), pack.scored_target.tolist(), pack.scored_sequence.tolist(), strict=True)
    assert list(scored) == expected_scored
    assert pack.sequence_tokens.tolist() == [len(r) for g in groups for r in (g.chosen, g.rejected)]
    assert pack.pair_ids.tolist() == [g.pair_id for g in groups]


@given(group_lists())
@settings(max_examples=30, deadline=None)
def test_both_layouts_score_the_same(groups):
    shared, unshared = (lay_out(groups, token_count(groups, share), share_prompts=share) for share in (True, False))
    for name in ("scored_target", "scored_sequence", "sequence_tokens", "pair_ids"):
        assert np.array_equal(getattr(shared, name), getattr(unshared, name)), name
    same = [shared.tokens[shared.scored_hidden], shared.positions[shared.scored_hidden]]
    expected_same = [unshared.tokens[unshared.scored_hidden], unshared.positions[unshared.scored_hidden]]
    assert np.array_equal(same, expected_same)


def test_example():
    """[P P P | W W | L], written out."""
    pack = lay_out([group(3, 3, 2, 1)], 8)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert pack.query_lengths.tolist() == [3, 2, 1]
    assert pack.key_lengths.tolist() == [3, 5, 4]
    assert pack.key_index.tolist() == [*[0, 1, 2], *[0, 1, 2, 3, 4], *[0, 1, 2, 5]]
    assert pack.scored_hidden.tolist() == [2, 3, 2]
    assert pack.scored_target.tolist() == [4, 5, 6]
    assert pack.scored_sequence.tolist() == [0, 0, 1]
    assert pack.sequence_tokens.tolist() == [2, 1]


def test_prompt_and_responses_of_one_token():
    pack = lay_out([group(0, 1, 1, 1), group(1, 1, 1, 1, first_token=11)], 6)
    assert pack.scored_hidden.tolist() == [0, 0, 3, 3]
    assert pack.scored_target.tolist() == [2, 3, 12, 13]
    assert pack.scored_sequence.tolist() == [0, 1, 2, 3]


def test_pack_without_pairs():
    pack = lay_out([], 8)
    assert pack.used == 0
    assert pack.tokens.tolist() == pack.positions.tolist() == [0] * 8
    for name in ("key_index", "scored_hidden", "scored_target", "scored_sequence", "sequence_tokens", "pair_ids"):
        assert getattr(pack, name).shape == (0,), name
        assert getattr(pack, name).dtype == np.int64, name


@pytest.mark.parametrize(("share", "needed"), [(True, 6), (False, 9)])
def test_overflow_is_an_error(share, needed):
    groups = [group(0, 3, 2, 1)]
    assert token_count(groups, share) == needed
    lay_out(groups, needed, share_prompts=share)
    with pytest.raises(ValueError, match=f"pack of {needed - 1} positions overflows: {needed} needed"):
        lay_out(groups, needed - 1, share_prompts=share)


def test_group_tokens_do_not_overflow_small_integers():
    """Lengths are int32 in the store; three of them need not fit."""
    most = np.iinfo(np.int32).max
    lengths = np.array([[most, most, most]], np.int32)
    assert group_tokens(lengths, share_prompts=True).tolist() == [3 * most]
    assert group_tokens(lengths, share_prompts=False).tolist() == [4 * most]
