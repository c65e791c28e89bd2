"""Which prompt a group's answers follow when they are mismatched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.prompt_kinds import PromptKind, other_groups
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
from megatron_bdpo.data.tokenization import PairTokens
from megatron_bdpo.data.tokenized_rows import RowsBuilder
from megatron_bdpo.errors import UserError
from tests.unit.data.test_groups import ids


def store_of(directory: Path, prompts: list[list[int]], pairs: int = 1) -> PairStore:
    """A store of rows with these prompts and so many pairs each."""
    builder = RowsBuilder()
    for row, prompt in enumerate(prompts):
        for pair in range(pairs):
            tokens = PairTokens(ids(*prompt), ids(row, pair, 1), ids(row, 2))
            builder.append(tokens, row + 1, PreferenceRecord("", "", ""))
    directory.mkdir(parents=True)
    with PairStoreWriter(directory) as writer:
        writer.extend(builder.finish(), 0)
        writer.finish(StoreInfo("0", {}, [7, 7, 7], (SourceSpec("rows.jsonl"),), DataReport(["rows.jsonl"])))
    return PairStore.open(directory)


A, B, C = [1, 2], [1, 3], [4]

CASES = {
    "all differ": ([A, B, C], [1, 0, 1]),
    "equal ones beside each other": ([A, B, B, B, C, C, A], [1, 0, 0, 0, 3, 3, 5]),
    "equal ones at the head": ([A, A, B], [2, 2, 1]),
    "equal ones apart": ([A, B, A], [1, 0, 1]),
    "one prompt": ([A, A], None),
    "one row": ([A], None),
}


@pytest.mark.parametrize(("prompts", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("pairs", [1, 3])
def test_the_nearest_other_prompt_before(tmp_path: Path, prompts, expected, pairs) -> None:
    found = other_groups(store_of(tmp_path / "store", prompts, pairs))
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize("seed", range(6))
def test_it_stays_when_the_store_grows(tmp_path: Path, seed: int) -> None:
    """Once there is a second prompt; and it always is another one."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, size=rng.integers(1, 3)).tolist() for _ in range(12)]
    whole = other_groups(store_of(tmp_path / "whole", prompts))
    assert whole is not None
    assert all(prompts[place] != prompts[other] for place, other in enumerate(whole.tolist()))
    for count in range(1, 12):
        part = other_groups(store_of(tmp_path / str(count), prompts[:count]))
        assert part is None or part.tolist() == whole[:count].tolist()
        assert (part is None) == (len(set(map(tuple, prompts[:count]))) == 1)


def test_a_pool_has_the_prompts_of_the_same_store(tmp_path: Path) -> None:
    pool = PairPool([store_of(tmp_path / "0", [A, C]), store_of(tmp_path / "1", [B, A, C], pairs=2)])
    assert pool.prompts.other_group.tolist() == [1, 0, 3, 2, 3]
    groups = np.array([4, 0])
    assert [pool.group(group, PromptKind.OTHER).group.prompt.tolist() for group in groups.tolist()] == [A, C]
    lengths = {kind: pool.prompts.lengths(groups, kind).tolist() for kind in PromptKind}
    assert lengths == {PromptKind.OWN: [1, 2], PromptKind.EMPTY: [3, 3], PromptKind.OTHER: [2, 1]}
    own, other = pool.group(4), pool.group(4, PromptKind.OTHER)
    assert other.pairs.tolist() == own.pairs.tolist() and np.array_equal(other.answers, own.answers)


def test_one_prompt_alone_is_refused(tmp_path: Path) -> None:
    pool = PairPool([store_of(tmp_path / "0", [A, A])])
    with pytest.raises(UserError, match=r"all rows of rows\.jsonl have one prompt.*add rows with other prompts"):
        pool.prompts.other_group  # noqa: B018
