"""What ``--eval-share`` holds out: whole prompts, as many groups as it says, the same ones whenever it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.data.digests import token_digests
from megatron_bdpo.data.held_out import Split, hold_out
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
from megatron_bdpo.data.tokenization import PairTokens
from megatron_bdpo.data.tokenized_rows import RowsBuilder
from megatron_bdpo.errors import UserError

#: How many prompts have how many groups, by a random number generator.
SHAPES: dict[str, Callable[[np.random.Generator], list[int]]] = {
    "most of one": lambda rng: [*rng.integers(1, 3, 300).tolist(), *rng.integers(3, 60, 5).tolist()],
    "none of one": lambda rng: rng.integers(2, 9, 60).tolist(),
    "a long tail": lambda rng: rng.zipf(1.7, 200).clip(max=150).tolist(),
    "two": lambda rng: rng.integers(1, 20, 2).tolist(),
    "one of most": lambda rng: [500, *[1] * 20],
}


def prompts_of(sizes: list[int], rng: np.random.Generator) -> np.ndarray:
    """[groups] of each the digest of its prompt, prompts anywhere in the file."""
    return rng.permutation(np.repeat(rng.integers(2**63, size=len(sizes)).astype(np.uint64), sizes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.004, 0.02, 0.25, 0.5, 0.97])
@pytest.mark.parametrize("seed", range(8))
def test_no_prompt_is_on_both_sides(shape, share, seed):
    rng = np.random.default_rng([seed, 1])
    sizes = SHAPES[shape](rng)
    prompts, groups = prompts_of(sizes, rng), np.arange(7, 7 + sum(sizes))
    wanted = round(len(groups) * share)
    if not wanted:
        with pytest.raises(UserError, match="is not even one"):
            hold_out(groups, prompts, share, seed)
        return
    split = hold_out(groups, prompts, share, seed)
    assert not np.isin(prompts[split.held_out - 7], prompts[split.train - 7]).any()
    assert np.sort([*split.train, *split.held_out]).tolist() == groups.tolist()
    assert (np.diff(split.train) > 0).all() and (np.diff(split.held_out) > 0).all()
    assert len(split.train) and len(split.held_out) and split.wanted == wanted
    nearest = min(abs(size - wanted) for size in possible_sizes(sizes))
    assert abs(len(split.held_out) - wanted) <= max(nearest, 0 if shape == "most of one" else max(sizes) // 2)
    again = hold_out(groups, prompts, share, seed)
    assert np.array_equal(again.held_out, split.held_out) and again.digest == split.digest


def possible_sizes(sizes: list[int]) -> list[int]:
    """Of a held-out part of whole prompts that is not all of them: an exhaustive search."""
    sums = 1  # bit n: some prompts have n groups together
    for size in sizes:
        sums |= sums << size
    return [size for size in range(1, sum(sizes)) if sums >> size & 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("groups", "share"), [(48, 0.25), (1000, 0.02), (11, 0.5), (7, 0.13)])
def test_prompts_that_do_not_repeat_are_split_by_the_seed_alone(groups, share, seed):
    """As groups were before prompts were kept together: the beginning of one permutation, whatever the prompts are."""
    expected = np.sort(np.random.default_rng([seed, 2]).permutation(groups)[: round(groups * share)])
    prompts = np.random.default_rng(seed).permutation(groups).astype(np.uint64)
    split = hold_out(np.arange(groups), prompts, share, seed)
    assert split.held_out.tolist() == expected.tolist()
    assert not split.prompts_repeat and split.notes == []


def test_what_is_held_out_depends_on_seed_and_repeats():
    prompts = np.repeat(np.arange(20, dtype=np.uint64), 5)
    splits = [hold_out(np.arange(100), prompts, 0.25, seed) for seed in range(6)]
    assert len({split.digest for split in splits}) == 6 and all(split.prompts_repeat for split in splits)
    assert all(len(split.held_out) == 25 for split in splits)


def test_every_prompt_has_the_same_chance():
    """However many groups it has: what its first group has drawn counts, not the luckiest of them."""
    sizes, seeds = [1] * 200 + [3] * 200, 200
    prompts = np.repeat(np.arange(400, dtype=np.uint64), sizes)
    found = np.zeros(400)
    for seed in range(seeds):
        held_out = hold_out(np.arange(800), prompts, 0.25, seed).held_out
        found[np.unique(prompts[held_out]).astype(int)] += 1
    means = found[:200].mean() / seeds, found[200:].mean() / seeds
    # The last gap, of one or two, is filled by prompts of one group: they come 1 in 200 more often.
    assert means == pytest.approx((0.25, 0.25), abs=0.012)


@pytest.mark.parametrize(
    ("sizes", "share", "expected"),
    [
        ([4, 4, 4, 4], 0.25, 4),
        ([4, 4, 4, 4], 0.35, 4),  # 6 is as near to 4 as to 8: the fewer
        ([4, 4, 4, 4], 0.43, 8),  # 7
        ([4, 4, 4, 4], 0.06, 4),  # 1: one prompt at least
        ([4, 4, 4, 4], 0.99, 12),  # 16: and one to train on
        ([9, 1], 0.3, 1),
        ([9, 1], 0.9, 9),
        ([1, 1, 1], 0.99, 2),
    ],
    ids=["exact", "a tie", "more is nearer", "one at least", "one left", "a big one", "it fits", "one of each"],
)  # fmt: skip
def test_the_nearest_share(sizes, share, expected):
    groups = sum(sizes)
    for seed in range(5):
        split = hold_out(np.arange(groups), np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes), share, seed)
        assert len(split.held_out) == expected
        wanted = round(groups * share)
        told = [f"--eval-share is {wanted} rows, and {expected} is the nearest with whole prompts"]
        assert split.notes == (told if expected != wanted else [])


def test_refusals():
    one = np.zeros(8, np.uint64)
    with pytest.raises(UserError, match=r"--eval-share 0.25: all 8 usable rows have one prompt.*--eval-pair-data"):
        hold_out(np.arange(8), one, 0.25, seed=1)
    with pytest.raises(UserError, match=r"--eval-share 0.01 of 8 usable rows is not even one"):
        hold_out(np.arange(8), np.arange(8, dtype=np.uint64), 0.01, seed=1)
    for share in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="--eval-share must be at least 0 and below 1, not"):
            hold_out(np.arange(8), one, share, seed=1)


def test_equal_prompts_are_those_of_equal_tokens(tmp_path: Path) -> None:
    """Wherever they lie, after whatever beginning, of pairs, groups and labelled answers; a prefix is another one."""
    rows = [((1, 2), 1), ((1,), 2), ((2, 1), 3), ((1, 2), 4), ((1, 2, 3), 5), ((1,), 6)]
    builder = RowsBuilder()
    for prompt, row in rows:
        for answers in ((4, 5), (4, 6)):  # a group of two pairs
            tokens = [np.array(each, np.int32) for each in (prompt, answers[:1], answers[1:])]
            builder.append(PairTokens(*tokens), row, PreferenceRecord("", "", ""))
    (tmp_path / "store").mkdir()
    with PairStoreWriter(tmp_path / "store") as writer:
        writer.extend(builder.finish(), 0)
        writer.finish(StoreInfo("0", {}, [7], (SourceSpec("a"),), DataReport(["a"])))
    prompts = PairPool([PairStore.open(tmp_path / "store")]).prompts.digests(0)
    assert prompts.tolist() == token_digests(np.array(prompt, np.int32) for prompt, _ in rows).tolist()
    assert [(prompts == each).sum() for each in prompts] == [2, 2, 1, 2, 1, 2]


def test_a_million_rows_take_little_time_and_memory():
    """Beside the digests: a dozen numbers for each row."""
    import resource
    import time

    rng = np.random.default_rng(1)
    prompts = rng.integers(400_000, size=1_000_000).astype(np.uint64)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    split: Split = hold_out(np.arange(len(prompts)), prompts, 0.02, 1)
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(split.held_out) == 20_000 and not np.isin(prompts[split.held_out], prompts[split.train]).any()
    assert seconds < 5 and grown < 200_000, (seconds, grown)  # measured: 0.4 s and 90 MiB
