"""A pack split over context-parallel ranks: who holds which positions, and what is left of the runs.

Each rank holds an equal share of the pack's positions and only their queries. Keys and values of all ranks are gathered
in every layer, so any split gives the same numbers and the choice is about cost alone: all positions cost the same
matrix multiplications, and a query costs as many dot products as it sees keys. The pack is cut into equal chunks, and
the chunks are dealt out so that every rank's queries see about as many keys.

Shapes: T pack length, C ranks, R runs, N scored positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_bdpo.data.packs import IntArray, Pack

#: Chunks that a rank may get. More of them balance better, but each one gathers the keys before it once more.
_CHUNKS_PER_RANK = (2, 4, 8)

#: Largest share of the cost over its mean at which more chunks are not worth their keys.
_BALANCED = 1.02


@dataclass(frozen=True)
class ContextRank:
    """One of the ranks that share a pack."""

    size: int = 1
    rank: int = 0


ALONE = ContextRank()
"""Without context parallelism."""


def context_part(pack: Pack, context: ContextRank) -> Pack:
    """What one rank holds of a pack: T / C positions in the pack's order, padding last.

    Token, position, group, query, scored and end arrays are about these positions, ``scored_hidden`` and ``ends`` count
    them from 0.
    ``key_index`` points into the keys of all ranks, gathered one rank after the other. ``answer_tokens``,
    ``scored_answer`` and ``end_answer`` still number the whole pack's answers.

    Raises:
        ValueError: if the ranks cannot get equal shares.
    """
    if context.size == 1:
        return pack
    held = _deal(keys_seen(pack), context.size)
    own = held[context.rank]
    gathered_place = np.empty(len(pack.tokens), np.int64)
    gathered_place[held.reshape(-1)] = np.arange(len(pack.tokens))
    local_place = gathered_place - context.rank * len(own)  # of own positions
    query_lengths, keys = _runs_of(pack, own)
    scored, ends = np.isin(pack.scored_hidden, own), np.isin(pack.ends, own)
    return dataclasses.replace(
        pack,
        tokens=pack.tokens[own],
        positions=pack.positions[own],
        groups=pack.groups[own],
        query_lengths=query_lengths,
        key_lengths=np.array([len(part) for part in keys], np.int64),
        key_index=gathered_place[np.concatenate([*keys, np.zeros(0, np.int64)])],
        scored_hidden=local_place[pack.scored_hidden[scored]],
        scored_target=pack.scored_target[scored],
        scored_answer=pack.scored_answer[scored],
        ends=local_place[pack.ends[ends]],
        end_answer=pack.end_answer[ends],
    )


def keys_seen(pack: Pack) -> IntArray:
    """[T] keys that each position of a whole pack attends to; 0 for padding."""
    seen = np.zeros(len(pack.tokens), np.int64)
    past = np.repeat(pack.key_lengths - np.cumsum(pack.query_lengths), pack.query_lengths)
    seen[: pack.used] = past + np.arange(1, pack.used + 1)
    return seen


def imbalance(pack: Pack, ranks: int) -> float:
    """Largest over mean attention cost of the ranks that share this pack; 1 is perfect, also for an empty pack."""
    cost = keys_seen(pack)
    return _max_over_mean(cost[_deal(cost, ranks)].sum(axis=1))


def _deal(cost: IntArray, ranks: int) -> IntArray:
    """[C, T / C] positions that each rank holds, ascending: the fewest chunks that balance, or the best balance."""
    if len(cost) % ranks:
        raise ValueError(f"a pack of {len(cost)} positions cannot be shared equally by {ranks} ranks")
    best, best_balance = np.arange(len(cost)).reshape(ranks, -1), np.inf
    for per_rank in _CHUNKS_PER_RANK:
        if len(cost) % (ranks * per_rank):
            break
        chunks = np.arange(len(cost)).reshape(ranks * per_rank, -1)
        weights = cost[chunks].sum(axis=1)
        dealt = _deal_chunks(weights, ranks)
        balance = _max_over_mean(weights[dealt].sum(axis=1))
        if balance < best_balance:
            best, best_balance = chunks[dealt].reshape(ranks, -1), balance
        if balance <= _BALANCED:
            break
    return best


def _deal_chunks(weights: IntArray, ranks: int) -> IntArray:
    """[C, chunks / C] chunks of each rank, ascending: heaviest first to the lightest rank that has room."""
    room = np.full(ranks, len(weights) // ranks)
    load = np.zeros(ranks)
    rank_of = np.empty(len(weights), np.int64)
    for chunk in np.argsort(-weights, kind="stable"):
        lightest = int(np.argmin(np.where(room > 0, load, np.inf)))
        rank_of[chunk] = lightest
        load[lightest] += weights[chunk]
        room[lightest] -= 1
    return np.argsort(rank_of, kind="stable").reshape(ranks, -1)


def _max_over_mean(load: IntArray) -> float:
    return float(load.max() / load.mean()) if load.any() else 1.0


def _runs_of(pack: Pack, own: IntArray) -> tuple[IntArray, list[IntArray]]:
    """The runs that cover ``own`` positions: query lengths, and for each run its keys as indices into the pack."""
    own = own[own < pack.used]
    run_of = np.repeat(np.arange(len(pack.query_lengths)), pack.query_lengths)[own]
    breaks = np.flatnonzero((np.diff(own) != 1) | (np.diff(run_of) != 0)) + 1
    query_stops, key_stops = np.cumsum(pack.query_lengths), np.cumsum(pack.key_lengths)
    lengths, keys = [], []
    for stretch in np.split(own, breaks) if len(own) else []:
        run = run_of[np.searchsorted(own, stretch[0])]
        later = query_stops[run] - 1 - stretch[-1]  # queries of the run after this stretch, which it must not see
        keys.append(pack.key_index[key_stops[run] - pack.key_lengths[run] : key_stops[run] - later])
        lengths.append(len(stretch))
    return np.array(lengths, np.int64), keys
