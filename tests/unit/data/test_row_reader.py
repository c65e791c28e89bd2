"""Which reader a file gets, with which settings; renamed columns; several pairs of a row from file to store."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_bdpo.data import formats
from megatron_bdpo.data.check import check_rows
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.row_reader import FormatSettings, refuse_unused, row_readers
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.errors import UserError
from tests.unit.data.test_formats import EXAMPLES, example, graded, reader


def written(path: Path, *rows: Any) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(str(path))


def test_the_first_readable_row_of_each_source_decides(tmp_path):
    odd = {"prompt": "nothing else"}
    sources = [
        written(tmp_path / "a.jsonl", 3, odd, example("alpaca"), example("orca")),
        written(tmp_path / "b.jsonl", example("nectar")),
        written(tmp_path / "c.jsonl", odd),
    ]
    alpaca, nectar, unknown = row_readers(sources, FormatSettings())
    assert (alpaca.format.name, nectar.format.name, unknown.format.name) == ("alpaca", "nectar", "trl")
    with pytest.raises(RowProblem) as caught:
        alpaca.records(example("orca"))
    for words in ("the form of orca", f"{tmp_path}/a.jsonl, line 3", "read as alpaca", "--pair-format"):
        assert words in caught.value.detail
    with pytest.raises(RowProblem, match=r"'chosen' is missing.*read as alpaca, the format of"):
        alpaca.records({"instruction": "a"})
    with pytest.raises(RowProblem, match=r"no known format: name it with --pair-format, or their columns"):
        unknown.records(odd)


def test_a_row_of_another_form_among_rows_that_are_read_as_they_are(tmp_path):
    (trl,) = row_readers([written(tmp_path / "a.jsonl", example("trl"))], FormatSettings())
    assert trl.records(example("hh-rlhf")) == [example("hh-rlhf")]  # these forms may be mixed
    with pytest.raises(
        RowProblem, match=r"orca, and needs a source of its own \(read as trl, the format of .*line 1; --pair"
    ):
        trl.records(example("orca"))


@pytest.mark.parametrize("name", formats.NAMES)
def test_a_reader_can_be_sent_to_another_process(name, tmp_path):
    (made,) = row_readers([written(tmp_path / "a.jsonl", example(name))], FormatSettings())
    again = pickle.loads(pickle.dumps(made))
    assert again == made and again.records(example(name)) == made.records(example(name))


def test_several_pairs_of_a_row_are_counted(tmp_path):
    tied = example("nectar") | {"answers": graded(1, 1)}
    source = written(tmp_path / "a.jsonl", example("nectar"), tied, example("nectar", 1))
    report = check_rows((source,), form=FormatSettings.parse(pairs_from="all"))
    assert (report.rows_read, report.rows, report.pairs_kept, report.dropped_rows) == ([5], 3, [4], 1)
    assert report.format().startswith("pairs: 4 in 2 groups kept of 5 pairs of 3 rows (1 dropped, 20.00%)")
    assert [(each.kind, each.rows) for each in report.problems] == [("TIED", [2])]
    assert check_rows((source,), max_rows=1, form=FormatSettings.parse(pairs_from="all")).pairs_kept == [3]


def test_pairs_of_a_row_in_a_store(tmp_path, megatron_tokenizer, qwen_like):
    """Each under the number of their row; and every way to make pairs has a store of its own."""
    tokenizer = PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like)))
    sources = (SourceSpec(str(EXAMPLES / "nectar.jsonl")),)
    stores = {
        way: prepare_pairs(PairDataSettings(sources, tmp_path, form=FormatSettings.parse(**way_of)), tokenizer)
        for way, way_of in (
            ("default", {}),
            ("best-worst", {"pairs_from": "best-worst"}),
            ("all", {"pairs_from": "all"}),
        )
    }
    assert stores["default"].directory == stores["best-worst"].directory != stores["all"].directory
    assert stores["default"].row.tolist() == [1, 2]
    assert stores["all"].row.tolist() == [1, 1, 1, 2]
    assert stores["all"].report.rows_read == stores["all"].report.pairs_kept == [4]


def test_options_without_a_use_are_refused(tmp_path):
    sources = [written(tmp_path / f"{name}.jsonl", example(name)) for name in ("trl", "nectar", "pku-saferlhf")]
    for flags, users in ({"pairs_from": "best-worst"}, "nectar"), ({"pair_preference": "better"}, "pku-saferlhf"):
        chosen = FormatSettings.parse(**flags)
        refuse_unused(chosen, row_readers(sources, chosen))
        with pytest.raises(UserError, match=f"no difference to pairs of the format trl. It is for .*{users}"):
            refuse_unused(chosen, row_readers(sources[:1], chosen))
    refuse_unused(FormatSettings(), row_readers(sources, FormatSettings()))


# --pair-columns ------------------------------------------------------------------------------------------------------


def test_columns_are_renamed_before_the_format_is_looked_for(tmp_path):
    row = {"question": "Is zero even?", "answer_a": "Yes.", "answer_b": "No.", "id": 7, "chosen": "answer_a"}
    settings = FormatSettings.parse(pair_columns="prompt=question, chosen=answer_a,rejected=answer_b")
    (made,) = row_readers([written(tmp_path / "a.jsonl", {"other": 1}, row)], settings)
    assert made.format.name == "trl"
    assert made.records(row) == [{"prompt": "Is zero even?", "chosen": "Yes.", "rejected": "No.", "id": 7}]
    assert made.unread(row) == ["chosen", "id"]  # a column in whose place another one stands is read by nobody
    with pytest.raises(RowProblem) as caught:
        made.records({"question": "Is zero even?", "answer_a": "Yes."})
    assert caught.value.kind is ProblemKind.MISSING_COLUMN
    assert "'answer_b'" in caught.value.detail and "'rejected'" in caught.value.detail


def test_columns_can_be_swapped():
    given = {"pair_columns": "chosen=rejected,rejected=chosen"}
    (row,) = reader("trl", **given).records(example("trl"))
    assert row == {"prompt": "The sky is", "chosen": " green.", "rejected": " blue."}
    assert reader("trl", **given).unread(example("trl")) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pair_columns": "prompt"}, "'prompt' does not name two columns"),
        ({"pair_columns": "prompt="}, "'prompt=' does not name two columns"),
        ({"pair_columns": "=a"}, "'=a' does not name two columns"),
        ({"pair_columns": ""}, "'' does not name two columns"),
        ({"pair_columns": "prompt=a,"}, "'' does not name two columns"),
        ({"pair_columns": "promt=a"}, "no format reads a column 'promt'. Known are .*prompt"),
        ({"pair_columns": "answers=a", "pair_format": "trl"}, "no format reads a column 'answers'"),
        ({"pair_columns": "prompt=a,prompt=b"}, "'prompt' is named twice"),
        ({"pair_columns": "chosen=a,rejected=a"}, "'a' is named twice"),
        ({"pair_format": "nonsense"}, "no format 'nonsense'. Known are auto, .*trl"),
    ],
)
def test_wrong_settings(given, words):
    with pytest.raises(UserError, match=words) as caught:
        FormatSettings.parse(**given)
    assert len(caught.value.as_text().splitlines()) == 2


def test_what_decides_the_pairs():
    """Nothing is added where all is as by default: stores that exist keep their name."""
    assert FormatSettings.parse(pairs_from="best-worst", pair_preference="better").decisive() == {}
    given = {"pair_format": "nectar", "pairs_from": "all"}
    assert FormatSettings.parse(**given).decisive() == given
    assert FormatSettings.parse(pair_preference="safer").decisive() == {"pair_preference": "safer"}
    columns = [
        FormatSettings.parse(pair_columns=text).decisive() for text in ("prompt=a,chosen=b", "chosen=b,prompt=a")
    ]
    assert columns == [{"pair_columns": "chosen=b,prompt=a"}] * 2
