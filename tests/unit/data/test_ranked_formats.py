"""Rows with ranked answers: which pairs are made of them, and what is wrong with bad ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bdpo.data.formats import FORMATS
from megatron_bdpo.data.labels import UNJUDGED
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.row_reader import FormatSettings, RowReader
from megatron_bdpo.errors import UserError
from tests.unit.data.format_examples import assistant, example, graded, reader

TIED = ProblemKind.TIED


def places(rows: list[Any]) -> list[str]:
    """Which answer against which, as two digits; ties, which are told, beside."""
    made = [row for row in rows if not isinstance(row, RowProblem)]
    assert all(row.kind is TIED for row in rows if isinstance(row, RowProblem))
    return [row["chosen"][0]["content"][-1] + row["rejected"][0]["content"][-1] for row in made]


@pytest.mark.parametrize(
    ("pairs_from", "grades", "expected"),
    [
        ("best-worst", (2, 1, 3), ["12"]),
        ("all", (2, 1, 3), ["10", "12", "02"]),
        ("adjacent", (2, 1, 3), ["10", "02"]),
        ("best-worst", (1, 1, 2, 2), ["03"]),
        ("all", (1, 1, 2), ["02", "12"]),
        ("adjacent", (1, 1, 2), ["12"]),
        ("all", (10**400, 1e308, float("inf")), ["10", "12", "02"]),
        ("margin:1", (2, 1, 3), ["10", "12", "02"]),
        ("margin:1.5", (2, 1, 3), ["12"]),
        ("margin:0.1", (0.8, 0.9, 1.0), ["01", "02", "12"]),
        ("margin:0.1", tuple(map(float, np.float32([0.8, 0.9, 0.98]))), ["01", "02"]),
        ("margin:0.5", (10**400, 2 * 10**400, 0.5, 1e308), ["23", "20", "21", "30", "31"]),
        ("margin:1", (float("-inf"), 0, float("inf")), ["01", "02", "12"]),
    ],
)
def test_pairs_of_ranked_answers(pairs_from, grades, expected):
    row = example("nectar") | {"answers": graded(*grades)}
    assert places(reader("nectar", pairs_from=pairs_from).records(row)) == expected


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_all_pairs_are_those_of_different_rank(grades):
    row = example("nectar") | {"answers": graded(*grades)}
    expected = {
        f"{better}{worse}"
        for better, worse in itertools.permutations(range(len(grades)), 2)
        if grades[better] < grades[worse]
    }
    if not expected:
        with pytest.raises(RowProblem, match="same score or rank"):
            reader("nectar", pairs_from="all").records(row)
        return
    found = {way: places(reader("nectar", pairs_from=way).records(row)) for way in ("all", "adjacent", "best-worst")}
    assert sorted(found["all"]) == sorted(expected)
    every = reader("nectar", pairs_from="all").records(row)
    assert len(every) == len(grades) * (len(grades) - 1) // 2, "what is tied is told"
    assert set(found["adjacent"]) | set(found["best-worst"]) <= expected


def test_ties_are_counted():
    made = reader("nectar", pairs_from="all").records(example("nectar") | {"answers": graded(1, 2, 2)})
    (tie,) = (each for each in made if isinstance(each, RowProblem))
    assert tie.kind is TIED and tie.detail == "answers 2 and 3 have the same 'rank', 2"


def test_a_margin_is_the_same_however_it_is_written():
    written = ("margin:1", "margin:1.0", "margin:1e0")
    assert {FormatSettings.parse(pairs_from=each).decisive()["pairs_from"] for each in written} == {"margin:1.0"}


def test_a_pair_has_log_probs_where_both_of_its_answers_have():
    row = {"prompt": "", "responses": ["a", "b", "c"], "scores": [3, 2, 1], "ref_responses_logps": [-1, None, -3]}
    made = [parse_row(each) for each in reader("responses", pairs_from="all").records(row)]
    assert [each.reference for each in made] == [None, (-1, -3), None]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_an_answer_without_a_score_takes_no_part(missing):
    row = {"prompt": "", "responses": ["a", "b", "c"], "scores": [missing, 1, 2]}
    made = [parse_row(each) for each in reader("responses", pairs_from="all").records(row)]
    assert [(each.chosen, each.rejected, each.scores) for each in made] == [("c", "b", (2, 1))]


@pytest.mark.parametrize("nothing", ["", " \n", [{"role": "assistant", "content": ""}]], ids=["none", "space", "turn"])
@pytest.mark.parametrize("pairs_from", ["best-worst", "all", "adjacent", "margin:1"])
def test_an_answer_without_text_takes_nothing_of_its_row_along(pairs_from, nothing):
    """The worst of them, once, whatever the number of its pairs."""
    texts = ["a", nothing, "b"] if isinstance(nothing, str) else [[assistant("a")], nothing, [assistant("b")]]
    row = {"prompt": "q" if isinstance(nothing, str) else [{"role": "user", "content": "q"}], "responses": texts}
    problem, pair = reader("responses", pairs_from=pairs_from).records(row | {"scores": [3, 1, 2]})
    assert (problem.kind, problem.detail) == (ProblemKind.EMPTY_RESPONSE, "answer 2 has no text")
    assert parse_row(pair).scores == (3, 2)
    with pytest.raises(RowProblem, match="answer 2 has no text"):
        reader("responses", pairs_from=pairs_from).records(row | {"scores": [3, 1, None]})


def test_each_answer_by_itself():
    """For a reward model: rows of any number of answers that nobody has judged, and of no others."""
    each = FormatSettings(each_answer=True)
    (responses,) = (form for form in FORMATS if form.name == "responses")
    alone = RowReader(responses, each, "")
    row = {"prompt": [{"role": "user", "content": "?"}], "responses": ["a", "b", "a"], "tools": [{"x": 1}]}
    made = [parse_row(form) for form in alone.records(row)]
    assert [record.chosen[0]["content"] for record in made] == ["a", "b", "a"]
    assert all(record.rejected == record.chosen and record.label == UNJUDGED for record in made)
    assert each.decisive() == {"each_answer": True} and not FormatSettings().decisive()
    with pytest.raises(RowProblem, match="leave the column out"):
        alone.records(row | {"scores": [1, 2, 3]})


def test_no_file_has_an_answer_that_nobody_has_judged():
    with pytest.raises(RowProblem, match="column 'label' is 2; true or 1"):
        parse_row({"prompt": "a", "completion": "b", "label": UNJUDGED})


def test_no_answers_as_far_apart_as_asked_for():
    with pytest.raises(RowProblem, match=r"no two answers are 5 apart in 'rank'"):
        reader("nectar", pairs_from="margin:5").records(example("nectar"))


@pytest.mark.parametrize("given", ["some", "margin:", "margin:0", "margin:-1", "margin:inf", "margin:nan", "margin:X"])
def test_what_pairs_are_made_from_is_checked(given):
    with pytest.raises(UserError, match=r"--pairs-from .* is none of best-worst, all, adjacent, margin:X"):
        reader("nectar", pairs_from=given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": [1, 2, 3, 4]}, "both 'scores' and 'ranks'"),
        ({"scores": [1, 2]}, "'scores' has 2 entries for 4 answers"),
        ({"scores": [1, 2, "3", 4]}, "'scores' of answer 3 is str"),
        ({"scores": 3}, "'scores' is int; a list"),
        ({"scores": None}, "there are neither 'scores' nor 'ranks'; the row has prompt, re"),
        ({"scores": None}, "a reward model gives scores: megatron-bdpo score --objective reward --scored-rows FILE"),
        ({"scores": [None, 3, None, None]}, "1 of 4 answers have 'scores'; two are needed"),
        ({"scores": [None, 3, 3, None]}, "all answers have 'scores' 3"),
        ({"responses": ["one"]}, "'responses' holds 1 answers; two are needed"),
        ({"responses_safe": [True]}, "'responses_safe' has 1 entries for 4 answers"),
        ({"responses_safe": [True, True, 3, True]}, "'responses_safe' of answer 3 is 3; true, false"),
        ({"ref_responses_logps": [-1, -2, 3, None]}, "'ref_responses_logps' of answer 3 is 3; a log-prob"),
        ({"responses": ["a", "b", None, "d"]}, "'responses', answer 3 is NoneType; a string, a message or a list"),
        ({"scores": [5, 5, 5, 5]}, "all answers have 'scores' 5"),
    ],
)
def test_bad_lists_of_answers(changes, words):
    with pytest.raises(RowProblem) as caught:
        for row in reader("responses").records(example("responses") | changes):
            parse_row(row)
    assert words in caught.value.detail


def test_the_score_that_all_answers_have():
    """UltraFeedback's overall scores are known to be wrong here and there; they are the second choice."""
    row = example("ultrafeedback")
    row["completions"][2]["fine-grained_score"] = None
    (made,) = reader("ultrafeedback").records(row)
    assert made["chosen"] == [assistant("Lamp.")]  # 10.0
    assert made["rejected"] == [assistant("Kite, nearly.")]  # 5.0


def test_the_safer_answer():
    (row,) = reader("pku-saferlhf", pair_preference="safer").records(example("pku-saferlhf"))
    assert row["chosen"].startswith("Ring and ask") and row["rejected"].startswith("Lift")
    assert (row["chosen_safe"], row["rejected_safe"]) == (True, False)
