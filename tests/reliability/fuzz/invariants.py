"""What holds of every record, pack and plan, whatever the input. Each check raises AssertionError."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_bdpo.data.context import ContextRank, context_part
from megatron_bdpo.data.packs import Group, Pack
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.step_plan import PlanSettings, StepPlan, epoch_pairs, plan_steps

Pools = Sequence[tuple[np.ndarray, float]]

# Records -------------------------------------------------------------------------------------------------------------


def check_record(record: PreferenceRecord) -> None:
    """It is of one form, has text that can be encoded, and is what a row made of it gives."""
    texts = []
    for part in (record.prompt, record.chosen, record.rejected):
        assert isinstance(part, list) == record.is_chat
        assert isinstance(part, str) or all(message.keys() == {"role", "content"} for message in part)
        texts += [part] if isinstance(part, str) else [message["content"] for message in part]
    for text in texts:
        text.encode()
    if record.is_chat:
        assert record.prompt and record.chosen[-1]["role"] == record.rejected[-1]["role"] == "assistant"
        assert record.label is not None or len(record.chosen) == len(record.rejected) == 1
    if record.label is None:
        assert record.chosen != record.rejected
        again = parse_row(dataclasses.asdict(record))
    else:
        assert record.chosen == record.rejected
        row = {"prompt": record.prompt, "completion": record.chosen, "label": record.label}
        again = parse_row(row | ({} if record.reference is None else {"ref_logps": record.reference[0]}))
    assert again == record


# Packs ---------------------------------------------------------------------------------------------------------------


def attention(pack: Pack, length: int) -> np.ndarray:
    """bool [queries, length]: which gathered keys each used position attends to, by the pack's runs."""
    seen = np.zeros((pack.used, length), bool)
    query, key = 0, 0
    for queries, keys in zip(pack.query_lengths.tolist(), pack.key_lengths.tolist(), strict=True):
        gathered = pack.key_index[key : key + keys]
        assert len(set(gathered.tolist())) == keys == len(gathered), "a key comes twice in a run, or is missing"
        for i in range(queries):
            seen[query + i, gathered[: keys - queries + i + 1]] = True  # bottom-right causal
        query, key = query + queries, key + keys
    assert key == len(pack.key_index)
    return seen


def check_pack(pack: Pack, groups: Sequence[Group], length: int, *, shared: bool) -> None:
    """Every token is there once, at its position, sees its own past and nothing else, and answers are scored."""
    tokens, positions, branches, scored = [], [], [], []
    for number, group in enumerate(groups):
        answers, before = group.answers, sum(len(each.answers) for each in groups[:number])
        pieces = (
            [
                (group.prompt, 0, tuple(range(len(answers)))),
                *((answer, len(group.prompt), (i,)) for i, answer in enumerate(answers)),
            ]
            if shared
            else [(np.concatenate([group.prompt, answer]), 0, (i,)) for i, answer in enumerate(answers)]
        )
        place: dict[tuple[int, int], int] = {}  # (branch, position) -> where
        for piece, first, of in pieces:
            for offset, token in enumerate(piece.tolist()):
                place |= {(branch, first + offset): len(tokens) for branch in of}
                tokens.append(token)
                positions.append(first + offset)
                branches.append({(number, branch) for branch in of})
        for branch, answer in enumerate(answers):
            first = len(group.prompt)
            scored += [(place[branch, first + i - 1], t, before + branch) for i, t in enumerate(answer.tolist())]
    used = len(tokens)
    assert pack.used == used <= length == len(pack.tokens) == len(pack.positions)
    assert pack.tokens.tolist() == tokens + [0] * (length - used)
    assert pack.positions.tolist() == positions + [0] * (length - used)
    found = zip(pack.scored_hidden.tolist(), pack.scored_target.tolist(), pack.scored_answer.tolist(), strict=True)
    assert list(found) == scored
    assert pack.answer_tokens.tolist() == [len(each) for group in groups for each in group.answers]
    expected = [
        [bool(branches[query] <= branches[key]) and positions[key] <= positions[query] for key in range(used)]
        for query in range(used)
    ]
    seen = attention(pack, length)
    assert not seen[:, used:].any()
    assert seen[:, :used].tolist() == expected


def check_parts(pack: Pack, ranks: int) -> None:
    """The parts of the ranks of context parallelism, put together, are the pack."""
    length = len(pack.tokens)
    # Tokens and targets that name their place, so that nothing can change places unseen.
    named = dataclasses.replace(pack, tokens=np.arange(length), scored_target=np.arange(len(pack.scored_hidden)))
    parts = [context_part(named, ContextRank(ranks, rank)) for rank in range(ranks)]
    gathered = np.concatenate([part.tokens for part in parts])
    assert sorted(gathered.tolist()) == list(range(length))
    whole = attention(pack, length)
    scored: list[tuple[int, int, int]] = []
    for part in parts:
        own = part.tokens
        assert len(own) * ranks == length
        assert part.positions.tolist() == pack.positions[own].tolist()
        assert (own[part.used :] >= pack.used).all() and (own[: part.used] < pack.used).all()
        assert (attention(part, length) == whole[own[: part.used]][:, gathered]).all()
        hidden = own[part.scored_hidden]
        scored += zip(part.scored_target.tolist(), hidden.tolist(), part.scored_answer.tolist(), strict=True)
    expected = zip(range(len(pack.scored_hidden)), pack.scored_hidden.tolist(), pack.scored_answer, strict=True)
    assert sorted(scored) == [(target, hidden, int(sequence)) for target, hidden, sequence in expected]


# Plans ---------------------------------------------------------------------------------------------------------------


def steps_of_whole_epochs(pools: Pools, pairs_per_step: int, most: int) -> int | None:
    """The fewest steps after which every epoch begun is done; None where these are more than ``most``."""
    per_epoch = epoch_pairs(pools)
    window = min(per_epoch // pairs_per_step, 256)  # within a window the order is the plan's own affair
    steps = window * per_epoch // math.gcd(window * pairs_per_step, per_epoch)
    return steps if steps <= most else None


def check_plan(plan: StepPlan, sizes: np.ndarray, settings: PlanSettings, num_steps: int) -> None:
    """Exact pairs per step, each in one pack of one rank, some on every rank, and no pack too full."""
    assert plan.steps.shape == (num_steps, settings.pairs_per_step)
    assert plan.lengths.shape == (num_steps, plan.microbatches)
    assert (plan.lengths <= settings.max_pack_length).all() and (plan.lengths % settings.length_multiple == 0).all()
    assert plan.data_parallel == settings.data_parallel and plan.microbatches % settings.microbatch_multiple == 0
    if settings.one_length:
        assert (plan.lengths == plan.lengths[:, :1]).all()
    if settings.fixed_length:
        assert (plan.lengths == settings.max_pack_length).all()
    tokens = sizes[plan.steps].sum(axis=1)
    assert (plan.real_tokens == tokens).all()
    positions = plan.lengths.sum() * plan.data_parallel
    assert math.isclose(plan.fill, tokens.sum() / positions) and 0 < plan.fill <= 1
    for step, lengths in enumerate(plan.lengths.tolist()):
        found: list[int] = []
        for rank in range(plan.data_parallel):
            packs = plan.packs(step, rank)
            assert all(int(sizes[pack].sum()) <= length for pack, length in zip(packs, lengths, strict=True))
            assert sum(map(len, packs)), "a rank without a pair"
            found += np.concatenate(packs).tolist()
        assert sorted(found) == sorted(plan.steps[step].tolist())


def check_visits(plan: StepPlan, pools: Pools) -> None:
    """After whole epochs every pair has come as often as its source's weight says."""
    visits = np.bincount(plan.steps.ravel(), minlength=1 + max(int(ids.max(initial=0)) for ids, _ in pools))
    epochs, rest = divmod(plan.steps.size, epoch_pairs(pools))
    assert rest == 0
    for ids, weight in pools:
        if not len(ids):
            continue
        draws = max(1, round(len(ids) * weight))
        assert visits[ids].sum() == epochs * draws
        assert (visits[ids] >= epochs * (draws // len(ids))).all()
        assert (visits[ids] <= epochs * -(-draws // len(ids))).all()
    assert visits.sum() == plan.steps.size, "a pair that belongs to no source"


def check_same_steps(
    plan: StepPlan, sizes: np.ndarray, settings: PlanSettings, pools: Pools, shorter: int, other: PlanSettings
) -> None:
    """A shorter run and another layout have the same pairs in the same steps."""
    assert (plan_steps(sizes, settings, shorter, pools).steps == plan.steps[:shorter]).all()
    assert (plan_steps(sizes, other, len(plan.steps), pools).steps == plan.steps).all()
