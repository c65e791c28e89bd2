"""A pack split over context-parallel ranks: the parts together are the pack, and cost about the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.context import ContextRank, context_part, imbalance, keys_seen
from megatron_bdpo.data.packs import Pack, lay_out
from tests.unit.data.test_packs import group, group_lists, seen_by, token_count


def parts_of(pack: Pack, ranks: int) -> list[Pack]:
    return [context_part(pack, ContextRank(ranks, rank)) for rank in range(ranks)]


def shared_pack(groups, share: bool, ranks: int, chunk: int, padding: int = 0) -> Pack:
    """A pack whose length can be cut into 2 ``chunk``-sized pieces per rank, or more."""
    used = token_count(groups, share) + padding
    unit = ranks * chunk
    return lay_out(groups, max(unit, -(-used // unit) * unit), share_prompts=share)


@given(group_lists(), st.booleans(), st.integers(2, 4), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=200, deadline=None)
def test_parts_together_are_the_pack(groups, share, ranks, chunk):
    # A token, a position and a target that name their place, so that nothing can change places unseen.
    pack = shared_pack(groups, share, ranks, chunk)
    place = np.arange(len(pack.tokens))
    pack = dataclasses.replace(pack, tokens=place, scored_target=np.arange(len(pack.scored_hidden)))
    parts = parts_of(pack, ranks)
    gathered = np.concatenate([part.tokens for part in parts])  # the order of the gathered keys
    assert sorted(gathered) == place.tolist()
    expected_seen = seen_by(pack)
    scored = []
    for part in parts:
        assert len(part.tokens) == len(pack.tokens) // ranks
        assert part.positions.tolist() == pack.positions[part.tokens].tolist()
        seen = seen_by(part)
        for own, keys in zip(part.tokens[: part.used], seen, strict=True):
            assert gathered[keys].tolist() == expected_seen[own]
        assert (part.tokens[part.used :] >= pack.used).all(), "padding comes last"
        hidden = part.tokens[part.scored_hidden]
        scored += zip(part.scored_target.tolist(), hidden.tolist(), part.scored_answer.tolist(), strict=True)
        assert (np.diff(part.scored_answer) >= 0).all()
        assert part.answer_tokens.tolist() == pack.answer_tokens.tolist()
    expected_scored = zip(
        pack.scored_target.tolist(), pack.scored_hidden.tolist(), pack.scored_answer.tolist(), strict=True
    )
    assert sorted(scored) == list(expected_scored)


def test_one_rank_has_the_pack_itself():
    pack = lay_out([group(3, 2, 2)], 8)
    assert context_part(pack, ContextRank()) is pack


def test_keys_seen_are_those_of_the_runs():
    pack = lay_out([group(3, 2, 1), group(1, 1, 2)], 12)
    assert keys_seen(pack).tolist() == [1, 2, 3, 4, 5, 4, 1, 2, 2, 3, 0, 0]
    assert keys_seen(pack)[: pack.used].tolist() == [len(keys) for keys in seen_by(pack)]


LONG_CONVERSATION = [group(700, 120, 180)]
MANY_SHORT = [group(20 + 7 * i % 50, 30 + 11 * i % 40, 25 + 5 * i % 60) for i in range(7)]


@pytest.mark.parametrize("groups", [LONG_CONVERSATION, MANY_SHORT], ids=["long", "short"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_attention_cost_is_balanced(groups, ranks):
    pack = lay_out(groups, 1024)
    cost = [keys_seen(pack)[part.tokens].sum() for part in parts_of(by_place(pack), ranks)]
    assert max(cost) / np.mean(cost) == pytest.approx(imbalance(pack, ranks))
    assert imbalance(pack, ranks) < 1.05
    in_order = keys_seen(pack).reshape(ranks, -1).sum(axis=1)
    assert imbalance(pack, ranks) < 0.8 * (in_order.max() / in_order.mean() - 1) + 1, "no better than equal pieces"


def by_place(pack: Pack) -> Pack:
    return dataclasses.replace(pack, tokens=np.arange(len(pack.tokens)))


def test_empty_pack_is_shared_too():
    parts = parts_of(lay_out([], 16), 4)
    assert [len(part.tokens) for part in parts] == [4] * 4
    assert all(part.used == 0 and len(part.key_index) == 0 for part in parts)
    assert imbalance(lay_out([], 16), 4) == 1


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="10 positions cannot be shared equally by 4 ranks"):
        context_part(lay_out([], 10), ContextRank(4, 0))
