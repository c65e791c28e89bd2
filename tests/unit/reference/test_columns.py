"""Log-probs by pair become columns of the rows: whose value is whose, and which rows are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.row_reader import RECOGNISED, pair_rows, row_readers
from megatron_bdpo.data.sources import SourceSpec, content_digest
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference.cache import ScoreCache
from megatron_bdpo.training.reference.columns import add_columns

ASK, YES = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}
LIST = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [2, 9, 2, 5]}
#: Its pairs, the best answer first, as places in the list: of the two answers of equal score there is none.
PLACES = [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)]
OF_ANSWERS = [-1.5, -2.5, -3.5, -4.5]
VALUES = [(OF_ANSWERS[better], OF_ANSWERS[worse]) for better, worse in PLACES]

Scored = list[tuple[int, tuple[float, float]]]
"""Of each pair the row, counted from 1, and both log-probs."""


def written(
    directory: Path, rows: list[dict[str, Any]], scored: Scored, *, unscored: int = 0, **decisive: str
) -> list[dict[str, Any]]:
    """What becomes of rows with these scores, and of the first so many in a source of which none was scored."""
    data, other = directory / "data.jsonl", directory / "other.jsonl"
    for path, of_source in ((data, rows), (other, rows[:unscored])):
        path.write_text("".join(json.dumps(row) + "\n" for row in of_source))
    sources = [str(data), str(other)][: 1 + bool(unscored)]
    identity = {"data": [content_digest(SourceSpec(source)) for source in sources], **decisive}
    cache = ScoreCache.open(directory / "scores", identity, {"sources": sources})
    count = len(scored)
    columns = {
        "conditional": np.array([values for _, values in scored], np.float64),
        "unconditional": np.full((count, 2), np.nan),
        "tokens": np.ones((count, 2), np.int32),
        "source": np.zeros(count, np.int16),
        "row": np.array([row for row, _ in scored], np.int64),
    }
    cache.add(np.arange(count), columns, count)
    cache.finish(count, {"conditional": count}, {})
    output = directory / "rows.jsonl"
    counts = add_columns(directory / "scores", output)
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert counts == (len(made), len(rows) + unscored - len(made))
    return made


def test_a_list_gets_a_value_for_each_answer(tmp_path):
    scored: Scored = [(2, values) for values in VALUES]
    unscored = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}
    made = written(tmp_path, [unscored, LIST], scored, pairs_from="all")
    assert made == [LIST | {"ref_responses_logps": OF_ANSWERS}]


def test_an_answer_of_no_pair_gets_none(tmp_path):
    """Of the best and the worst: the first of two that are equally bad."""
    row = LIST | {"scores": [1, 9, 2, 5]}
    assert written(tmp_path, [row], [(1, VALUES[1])])[0]["ref_responses_logps"] == [-1.5, -2.5, None, None]


def test_a_source_of_which_nothing_was_scored(tmp_path):
    """As beyond --max-pairs."""
    scored: Scored = [(1, values) for values in VALUES]
    assert len(written(tmp_path, [LIST], scored, unscored=1, pairs_from="all")) == 1


def test_columns_of_other_names(tmp_path):
    row = {"prompt": "p", "answers": LIST["responses"], "scores": LIST["scores"]}
    scored: Scored = [(1, values) for values in VALUES]
    made = written(tmp_path, [row], scored, pairs_from="all", pair_columns="responses=answers")
    assert made == [row | {"ref_responses_logps": OF_ANSWERS}]


def test_equal_texts_are_no_pair(tmp_path):
    row = LIST | {"responses": ["b", "b", "c", "d"]}
    scored: Scored = [(1, values) for places, values in zip(PLACES, VALUES, strict=True) if places != (1, 0)]
    assert written(tmp_path, [row], scored, pairs_from="all")[0]["ref_responses_logps"] == OF_ANSWERS


@pytest.mark.parametrize(
    "scored",
    [
        pytest.param([(1, values) for values in VALUES[:4]], id="a pair was left out"),
        pytest.param([(1, values) for values in (*VALUES[:4], (np.nan, np.nan))], id="a pair was not scored"),
    ],
)
def test_a_list_is_left_out_where_pairs_are_missing(tmp_path, scored):
    assert not written(tmp_path, [LIST], scored, pairs_from="all")


def test_answers_that_begin_alike_have_other_prompts(tmp_path):
    """Two of three answers share their first two turns, which are part of their pair's prompt, not of the others'."""
    said = [{"role": "assistant", "content": "yes?"}, {"role": "user", "content": "go on"}]
    answers = [[*said, {"role": "assistant", "content": text}] for text in "ab"] + ["c"]
    row = {"prompt": [{"role": "user", "content": "p"}], "responses": answers, "scores": [3, 2, 1]}
    assert not written(tmp_path, [row], [(1, (-1, -2)), (1, (-3, -4)), (1, (-5, -4))], pairs_from="all")


def test_pairs_and_labelled_answers_have_columns_of_their_own(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "completion": "c", "label": True}]
    expected = [rows[0] | {"ref_chosen_logps": -1, "ref_rejected_logps": -2}, rows[1] | {"ref_logps": -3}]
    for number, order in enumerate(([0, 1], [1, 0])):
        values = [(-1.0, -2.0), (-3.0, -3.0)]
        (directory := tmp_path / str(number)).mkdir()
        made = written(directory, [rows[i] for i in order], [(row, values[i]) for row, i in enumerate(order, start=1)])
        assert made == [expected[i] for i in order]


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
    source = SourceSpec(str(tmp_path / "data.jsonl"))
    scores = -np.arange(1.0, 1 + 2 * len(rows)).reshape(-1, 2)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (reader,) = row_readers([source], RECOGNISED)
    is_one = np.array([parse_row(pair_rows(row, reader)[0]).label is not None for row in rows])
    scores[is_one, 1] = scores[is_one, 0]
    made = written(tmp_path, rows, list(enumerate(map(tuple, scores.tolist()), start=1)))
    (again,) = row_readers([SourceSpec(str(tmp_path / "rows.jsonl"))], RECOGNISED)
    assert again.format is reader.format
    for row, expected in zip(made, scores.tolist(), strict=True):
        (pair,) = pair_rows(row, again)
        assert parse_row(pair).reference == tuple(expected)
        assert again.unread(row) == []


def test_a_format_without_such_columns(tmp_path):
    row = {"context": [{"role": "user", "content": "p"}], "response1": "a", "response2": "b", "overall_preference": 2}
    with pytest.raises(UserError, match="line 1 is of the format helpsteer3, which has no column for log-probs"):
        written(tmp_path, [row], [(1, (-1.0, -2.0))])
    assert not (tmp_path / "rows.jsonl").exists()
