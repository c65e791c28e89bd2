"""Groups that are scored after other prompts than their own: what is reckoned for each is what its pack holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.unit.data.test_groups import stored

#: Prompts of all lengths, and rows of several answers among pairs; the empty prompt of ``stored`` is one token.
PROMPTS = [[9, 8], [7, 7, 7, 7, 7], [6, 5, 4], [3, 2, 1, 3, 2, 1, 3]]
ANSWERS = {"A": (1, 2), "B": (3,), "C": (4, 5, 6)}
PAIRS = [(0, "A", "B"), (1, "A", "B"), (1, "C", "A"), (1, "C", "B"), (2, "C", "A"), (3, "B", "C")]


def reckoned(directory: str) -> list[tuple[bool, int, int, int, int]]:
    """Whether prompts are shared, group, prompt, and its positions: reckoned, and held by its pack."""
    from megatron.core import parallel_state

    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.data.prompt_kinds import PromptKind
    from megatron_bdpo.data.records import PreferenceRecord
    from megatron_bdpo.data.tokenization import PairTokens
    from megatron_bdpo.data.tokenized_rows import RowsBuilder
    from megatron_bdpo.training.batches import PackMaker
    from megatron_bdpo.training.reference.passes import Groups, GroupScorer

    builder = RowsBuilder()
    for row, chosen, rejected in PAIRS:
        parts = (PROMPTS[row], ANSWERS[chosen], ANSWERS[rejected])
        builder.append(PairTokens(*(np.array(part, np.int32) for part in parts)), row + 1, PreferenceRecord("", "", ""))
    pool = PairPool([stored(Path(directory) / "store", builder.finish())])
    places = np.arange(len(PROMPTS)).repeat(len(PromptKind))
    groups = Groups(places, np.tile(np.array([*PromptKind]), len(PROMPTS)))
    found: list[tuple[bool, int, int, int, int]] = []

    def of_one(name: str) -> Any:
        return mock.patch.object(parallel_state, name, lambda: 1)

    for share in (True, False):
        make = PackMaker(pool, 64, share)
        scorer = GroupScorer([], mock.Mock(), make, unit=8, length=64, alone=True, fixed_length=False)
        with of_one("get_pipeline_model_parallel_world_size"), of_one("get_data_parallel_world_size"):
            blocks = [*scorer.blocks(groups)]
        for block in blocks:
            batch = make.mixed(block.groups.ids, block.groups.after, 64)
            (group,), (after,) = block.groups.ids.tolist(), block.groups.after.tolist()
            found.append((share, group, after, block.tokens, sum(batch.attention.query_lengths)))
    return found


def test_a_group_takes_as_many_positions_as_are_reckoned(ranks, tmp_path):
    (found,) = ranks(1)(reckoned, str(tmp_path))
    assert len(found) == 2 * len(PROMPTS) * 3
    for share, group, after, tokens, held in found:
        assert tokens == held, (share, group, after)
    assert len({tokens for share, group, _, tokens, _ in found if share and group == 1}) == 3, (
        "prompts of three lengths"
    )
