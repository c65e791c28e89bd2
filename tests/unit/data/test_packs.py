"""Packs against a definition in words: every token is (pair, segment, position), and that says whom it may see."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.packs import Group, GroupLengths, Pack, group_tokens, lay_out

PROMPT = "prompt"


class Token(NamedTuple):
    """One place of a pack."""

    group: int
    segment: int | str  # number of the answer, or the prompt
    position: int
    copy: int | None = None  # which answer a prompt belongs to, where each answer has its own


def group(prompt: int, *answers: int, first_token: int = 1) -> Group:
    """A group with these lengths and all tokens different."""
    lengths = [prompt, *answers]
    tokens = np.arange(first_token, first_token + sum(lengths), dtype=np.int32)
    first, *others = np.split(tokens, np.cumsum(lengths)[:-1])
    return Group(first, others)


@st.composite
def group_lists(draw) -> list[Group]:
    length = st.integers(1, 5)
    answers = st.sampled_from([1, 2, 2, 3, 5]).flatmap(lambda k: st.lists(length, min_size=k, max_size=k))
    lengths = draw(st.lists(st.tuples(length, answers), max_size=4))
    return [group(prompt, *answers, first_token=1 + 40 * i) for i, (prompt, answers) in enumerate(lengths)]


@pytest.mark.parametrize("share", [True, False])
def test_an_empty_prompt_is_refused(share):
    with pytest.raises(ValueError, match="group 1 has an empty prompt"):
        lay_out([group(1, 2, 2), group(0, 2, 2)], 16, share_prompts=share)


def token_count(groups: list[Group], share: bool) -> int:
    lengths = [np.array([[len(each.prompt), *map(len, each.answers)]]) for each in groups]
    return sum(int(group_tokens(each, share_prompts=share).sum()) for each in lengths)


def expected_tokens(groups: list[Group], share: bool) -> list[tuple[Token, int]]:
    """Every token of the pack in order, with its id."""
    listed = []
    for number, each in enumerate(groups):
        first = len(each.prompt)
        for copy in [None] if share else range(len(each.answers)):
            listed += [(Token(number, PROMPT, i, copy), token) for i, token in enumerate(each.prompt)]
            for segment, answer in enumerate(each.answers):
                if copy in (None, segment):
                    listed += [(Token(number, segment, first + i, copy), t) for i, t in enumerate(answer)]
    return listed


def may_see(query: Token, key: Token) -> bool:
    """Its own past: the prompt before it and its own answer, of its own group."""
    same_branch = key.segment in (PROMPT, query.segment) and key.copy == query.copy
    return key.group == query.group and same_branch and key.position <= query.position


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
def test_every_token_of_an_answer_is_scored_from_the_token_before_it(groups, share):
    pack = lay_out(groups, token_count(groups, share), share_prompts=share)
    place = {token: index for index, (token, _) in enumerate(expected_tokens(groups, share))}
    expected_scored, answers = [], 0
    for number, each in enumerate(groups):
        for segment, answer in enumerate(each.answers):
            copy = None if share else segment
            for i, target in enumerate(answer):
                before = Token(number, segment if i else PROMPT, len(each.prompt) + i - 1, copy)
                expected_scored.append((place[before], int(target), answers))
            answers += 1
    scored = zip(pack.scored_hidden.tolist(), pack.scored_target.tolist(), pack.scored_answer.tolist(), strict=True)
    assert list(scored) == expected_scored
    assert pack.answer_tokens.tolist() == [len(answer) for each in groups for answer in each.answers]


@given(group_lists())
@settings(max_examples=30, deadline=None)
def test_both_layouts_score_the_same(groups):
    shared, unshared = (lay_out(groups, token_count(groups, share), share_prompts=share) for share in (True, False))
    for name in ("scored_target", "scored_answer", "answer_tokens"):
        assert np.array_equal(getattr(shared, name), getattr(unshared, name)), name
    same = [shared.tokens[shared.scored_hidden], shared.positions[shared.scored_hidden]]
    expected_same = [unshared.tokens[unshared.scored_hidden], unshared.positions[unshared.scored_hidden]]
    assert np.array_equal(same, expected_same)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("answers", [1, 2, 3, 5])
def test_attention_of_a_group_is_what_its_tokens_see(answers, share):
    """Twice the keys, less the one of each query that a square counts once: n (n + 1) = n**2 + n."""
    lengths = np.random.default_rng(answers).integers(1, 9, (4, 1 + answers))
    squares = GroupLengths.of_table(lengths).squares(share_prompts=share)
    tokens = group_tokens(lengths, share_prompts=share)
    for each, square, count in zip(lengths.tolist(), squares, tokens, strict=True):
        pack = lay_out([group(*each)], int(count), share_prompts=share)
        assert 2 * sum(map(len, seen_by(pack))) - count == square


@pytest.mark.parametrize("share", [True, False])
def test_lengths_of_groups_with_any_number_of_answers(share):
    """From a list of answers in any order, as from a table for each of the groups."""
    table, other = np.array([[5, 3, 2, 9]]), np.array([[4, 1]])
    prompts, owner, tokens = np.array([5, 4]), np.array([0, 1, 0, 0]), np.array([2, 1, 3, 9])
    found = GroupLengths.of_answers(prompts, owner, tokens)
    alone = [GroupLengths.of_table(each) for each in (table, other)]
    for name in ("positions", "squares"):
        expected = [getattr(each, name)(share_prompts=share).item() for each in alone]
        assert getattr(found, name)(share_prompts=share).tolist() == expected, name
    longer = found.with_prompts(np.array([6, 6])).positions(share_prompts=share)
    assert longer.tolist() == [6 * (1 if share else 3) + 14, 6 + 1]


def test_example():
    """[P P P | A A | B], written out."""
    pack = lay_out([group(3, 2, 1)], 8)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert pack.query_lengths.tolist() == [3, 2, 1]
    assert pack.key_lengths.tolist() == [3, 5, 4]
    assert pack.key_index.tolist() == [*[0, 1, 2], *[0, 1, 2, 3, 4], *[0, 1, 2, 5]]
    assert pack.scored_hidden.tolist() == [2, 3, 2]
    assert pack.scored_target.tolist() == [4, 5, 6]
    assert pack.scored_answer.tolist() == [0, 0, 1]
    assert pack.answer_tokens.tolist() == [2, 1]


def test_one_answer_is_a_plain_sequence():
    pack = lay_out([group(3, 2)], 5)
    assert pack.positions.tolist() == [0, 1, 2, 3, 4]
    assert pack.scored_hidden.tolist() == [2, 3]
    assert seen_by(pack) == seen_by(lay_out([group(3, 2)], 5, share_prompts=False))


def test_prompt_and_answers_of_one_token():
    pack = lay_out([group(1, 1, 1), group(1, 1, 1, first_token=11)], 6)
    assert pack.scored_hidden.tolist() == [0, 0, 3, 3]
    assert pack.scored_target.tolist() == [2, 3, 12, 13]
    assert pack.scored_answer.tolist() == [0, 1, 2, 3]


def test_pack_without_groups():
    pack = lay_out([], 8)
    assert pack.used == 0
    assert pack.tokens.tolist() == pack.positions.tolist() == [0] * 8
    for name in ("key_index", "scored_hidden", "scored_target", "scored_answer", "answer_tokens"):
        assert getattr(pack, name).shape == (0,), name
        assert getattr(pack, name).dtype == np.int64, name


@pytest.mark.parametrize(("share", "needed"), [(True, 6), (False, 9)])
def test_overflow_is_an_error(share, needed):
    groups = [group(3, 2, 1)]
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
