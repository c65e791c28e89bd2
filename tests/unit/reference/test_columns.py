"""Scores as columns of the rows they are of: two of a pair, one of a labelled answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.row_reader import RECOGNISED, pair_rows, row_readers
from megatron_bdpo.data.sources import SourceSpec, content_digest
from megatron_bdpo.training.reference.cache import ScoreCache
from megatron_bdpo.training.reference.columns import add_columns

ASK, YES = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "label": True}],
        [{"messages": [ASK, YES], "label": 0}, {"messages": [ASK, YES], "label": 1}],
        [{"conversations": [ASK, YES], "kto_tag": True}],
        [{"instruction": "?", "output": "yes", "kto_tag": False}],
        [{"input": "a", "output": "b", "label": 1}],
        [{"question": "?", "completion": "yes", "label": True}],
        [{"messages": [ASK, YES], "rejected_response": "no"}],
    ],
    ids=["ours", "ms-swift", "llama-factory", "alpaca", "openrlhf", "axolotl", "ms-swift's pairs"],
)
def test_what_is_written_is_read(tmp_path, rows):
    """By the same form, as the reference's log-probs of the same answers."""
    source = SourceSpec(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (reader,) = row_readers([source], RECOGNISED)
    is_one = np.array([parse_row(pair_rows(row, reader)[0]).label is not None for row in rows])
    scores = -np.arange(1.0, 1 + 2 * len(rows)).reshape(-1, 2)
    scores[is_one, 1] = scores[is_one, 0]
    cache = ScoreCache.open(tmp_path / "scores", {"data": [content_digest(source)]}, {"sources": [source.path]})
    arrays = {
        "conditional": scores, "unconditional": np.full_like(scores, np.nan),
        "tokens": np.ones(scores.shape, np.int32), "source": np.zeros(len(rows), np.int16),
        "row": np.arange(1, len(rows) + 1),
    }  # fmt: skip
    cache.add(np.arange(len(rows)), arrays, len(rows))
    cache.finish(len(rows), {"conditional": len(rows)}, {"ranks": 1})
    assert add_columns(tmp_path / "scores", tmp_path / "written.jsonl") == (len(rows), 0)
    (again,) = row_readers([SourceSpec(str(tmp_path / "written.jsonl"))], RECOGNISED)
    assert again.format is reader.format
    for line, expected in zip((tmp_path / "written.jsonl").open(), scores.tolist(), strict=True):
        row = json.loads(line)
        (made,) = pair_rows(row, again)
        assert parse_row(made).reference == tuple(expected)
        assert again.unread(row) == []
