"""Every form of a row, and every reason for which a row gives no record, and the report of them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.tokenized_rows import Outcome


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASK = [user("hello")]
TURNS = [user("hello"), assistant("hi"), user("and now?")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}, PreferenceRecord("Q: ", "yes", "no"), id="strings"
        ),
        pytest.param(
            {"prompt": "", "chosen": "yes", "rejected": "no"}, PreferenceRecord("", "yes", "no"), id="empty prompt"
        ),
        pytest.param(
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"},
            PreferenceRecord("\n\nHuman: a\n\nAssistant:", " x", " y"),
            id="implicit strings",
        ),
        pytest.param(
            {"prompt": None, "chosen": "A\n\nAssistant: b\n\nHuman: c\n\nAssistant: Yes, d", "rejected":
             "A\n\nAssistant: b\n\nHuman: c\n\nAssistant: Yes, e"},
            PreferenceRecord("A\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " Yes, d", " Yes, e"),
            id="implicit strings, two turns, responses that begin alike",
        ),
        pytest.param(
            {"prompt": TURNS, "chosen": [assistant("yes")], "rejected": [assistant("no")]},
            PreferenceRecord(TURNS, [assistant("yes")], [assistant("no")]),
            id="messages",
        ),
        pytest.param(
            {"prompt": TURNS, "chosen": "yes", "rejected": "no"},
            PreferenceRecord(TURNS, [assistant("yes")], [assistant("no")]),
            id="messages with string responses",
        ),
        pytest.param(
            {"prompt": ASK, "chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]},
            PreferenceRecord(ASK, [assistant("yes")], [assistant("no")]),
            id="messages that repeat the prompt",
        ),
        pytest.param(
            {"prompt": "hello", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
            PreferenceRecord(ASK, [assistant("yes")], [assistant("no")]),
            id="string prompt, message responses",
        ),
        pytest.param(
            {"prompt": "hello", "chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]},
            PreferenceRecord(ASK, [assistant("yes")], [assistant("no")]),
            id="string prompt, whole conversations (UltraFeedback)",
        ),
        pytest.param(
            {"chosen": [*TURNS, assistant("yes")], "rejected": [*TURNS, assistant("no")]},
            PreferenceRecord(TURNS, [assistant("yes")], [assistant("no")]),
            id="implicit messages",
        ),
    ],
)  # fmt: skip
def test_forms(row: dict[str, Any], expected: PreferenceRecord) -> None:
    record = parse_row(row)

    assert record == expected
    assert record.is_chat == isinstance(expected.prompt, list)


def test_messages_are_kept_whole() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call], "name": None, "reasoning_content": "r"}
    answers = {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"}
    prompt = [user("a"), asks, answers]

    record = parse_row({"prompt": prompt, "chosen": "b", "rejected": "c"})

    parsed = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    kept = {"role": "assistant", "content": None, "tool_calls": [parsed], "reasoning_content": "r"}
    assert record.prompt == [user("a"), kept, answers]


def test_what_a_template_reads_beside_messages() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"default": None}}}
    row = {"prompt": ASK, "chosen": "b", "rejected": "c"}
    row |= {"tools": json.dumps([tool]), "documents": [{"text": "t"}], "chat_template_kwargs": '{"think": false}'}

    assert parse_row(row).variables == {"tools": [tool], "documents": [{"text": "t"}], "think": False}
    assert parse_row({**row, "tools": [json.dumps(tool)]}).variables["tools"] == [tool]
    assert "tools" not in parse_row({**row, "tools": []}).variables
    assert not parse_row({**row, "prompt": "text"}).variables


def test_text_parts_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert parse_row({"prompt": [{"role": "user", "content": parts}], "chosen": "c", "rejected": "d"}).prompt == [
        user("ab")
    ]


def test_what_both_answers_begin_with_is_the_prompts() -> None:
    again = [assistant("b"), user("c")]
    row = {"prompt": ASK, "chosen": [*again, assistant("d")], "rejected": [*again, assistant("e")]}

    assert parse_row(row) == PreferenceRecord([*ASK, *again], [assistant("d")], [assistant("e")])


def test_answers_of_several_turns() -> None:
    chosen, rejected = [assistant("b"), user("c"), assistant("d")], [assistant("e")]

    assert parse_row({"chosen": [*ASK, *chosen], "rejected": [*ASK, *rejected]}) == PreferenceRecord(
        ASK, chosen, rejected
    )
    # One goes on where the other ends: its answer begins where the other's last message does.
    goes_on = [*rejected, user("f"), assistant("g")]
    assert parse_row({"prompt": ASK, "chosen": goes_on, "rejected": rejected}) == PreferenceRecord(
        ASK, goes_on, rejected
    )


def test_dialogues_that_part_early() -> None:
    rest = " a\n\nHuman: b\n\nAssistant: c"
    record = parse_row({"chosen": f"Q\n\nAssistant:{rest}", "rejected": "Q\n\nAssistant: d"})

    assert record == PreferenceRecord("Q\n\nAssistant:", rest, " d", is_dialogue=True)


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (False, False), (1, True), (0, False), (1.0, True), (None, None)]
)
def test_safety_labels(value: object, expected: bool | None) -> None:
    record = parse_row({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_safe": value})

    assert record.chosen_safe is expected
    assert record.rejected_safe is None


WRONG = ProblemKind.WRONG_TYPE


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        pytest.param({"prompt": "p", "chosen": "a"}, ProblemKind.MISSING_COLUMN, "'rejected' is missing", id="missing"),
        pytest.param({"chosen": None, "rejected": "a"}, ProblemKind.MISSING_COLUMN, "'chosen' is null", id="null"),
        pytest.param(
            {"chosen": "a", "rejected": "b"}, ProblemKind.MISSING_COLUMN, "add a 'prompt' column", id="no markers"
        ),
        pytest.param({"prompt": 3, "chosen": "a", "rejected": "b"}, WRONG, "'prompt' is int", id="number"),
        pytest.param({"prompt": [], "chosen": "a", "rejected": "b"}, WRONG, "empty list", id="no message"),
        pytest.param({"prompt": "p", "chosen": "a", "rejected": [assistant("b")]}, WRONG, "both", id="mixed"),
        pytest.param({"prompt": ["x"], "chosen": "a", "rejected": "b"}, WRONG, "message 1", id="no object"),
        pytest.param(
            {"prompt": [user("a"), {"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
            WRONG, "message 2: content has a part of type image", id="picture",
        ),
        pytest.param(
            {"prompt": [{**assistant("a"), "tool_calls": [{}]}], "chosen": "a", "rejected": "b"},
            WRONG, "tool_calls", id="tool calls",
        ),
        pytest.param({"prompt": "p\ud800", "chosen": "a", "rejected": "b"}, WRONG, "Unicode", id="half a surrogate"),
        pytest.param(
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_safe": "yes"}, WRONG, "'yes'", id="label word"
        ),
        pytest.param(
            {"prompt": "p", "chosen": "a", "rejected": "b", "rejected_safe": 2}, WRONG, "rejected_safe", id="label 2"
        ),
        pytest.param(
            {"prompt": "p", "chosen": "a", "rejected": " \n"}, ProblemKind.EMPTY_RESPONSE, "rejected", id="blank"
        ),
        pytest.param(
            {"prompt": ASK, "chosen": [assistant("")], "rejected": "b"}, WRONG, "both", id="mixed forms of responses"
        ),
        pytest.param(
            {"prompt": ASK, "chosen": [assistant("")], "rejected": [assistant("b")]},
            ProblemKind.EMPTY_RESPONSE, "chosen", id="empty message",
        ),
        pytest.param(
            {"prompt": "p", "chosen": "a", "rejected": "a"}, ProblemKind.IDENTICAL_RESPONSES, "same", id="identical"
        ),
        pytest.param(
            {"prompt": ASK, "chosen": [*ASK, assistant("a")], "rejected": [assistant("a")]},
            ProblemKind.IDENTICAL_RESPONSES, "after the prompt", id="identical, one with the prompt before it",
        ),
        pytest.param(
            {"chosen": "X\n\nAssistant: a", "rejected": "Y\n\nAssistant: b"},
            ProblemKind.NO_COMMON_PROMPT, "first", id="other questions",
        ),
        pytest.param(
            {"prompt": ASK, "chosen": "a", "rejected": "b", "tools": "x"}, WRONG, "'tools'", id="tools are no JSON"
        ),
        pytest.param({"prompt": ASK, "chosen": "a", "rejected": "b", "tools": [3]}, WRONG, "'tools'", id="tool 3"),
        pytest.param(
            {"prompt": ASK, "chosen": "a", "rejected": "b", "chat_template_kwargs": [1]},
            WRONG, "not an object", id="list of template options",
        ),
        pytest.param(
            {"prompt": ASK, "chosen": "a", "rejected": "b", "chat_template_kwargs": {"messages": []}},
            WRONG, "'messages'", id="a template option that is ours",
        ),
        pytest.param(
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            ProblemKind.NO_COMMON_PROMPT, "first message", id="other first message",
        ),
        pytest.param(
            {"chosen": [*ASK, assistant("b"), *TURNS], "rejected": [*ASK, assistant("c")]},
            ProblemKind.NO_ASSISTANT_TURN, "chosen holds assistant, ", id="the user has the last word",
        ),
        pytest.param(
            {"chosen": ASK, "rejected": [*ASK, assistant("c")]},
            ProblemKind.NO_COMMON_PROMPT, "ends with it", id="one conversation is a question",
        ),
        pytest.param(
            {"prompt": "other", "chosen": [*ASK, assistant("b")], "rejected": [*ASK, assistant("c")]},
            ProblemKind.NO_COMMON_PROMPT, "prompt column", id="prompt contradicts",
        ),
        pytest.param(
            {"chosen": [*ASK, user("b")], "rejected": [*ASK, user("c")]},
            ProblemKind.NO_ASSISTANT_TURN, "chosen holds user", id="the user answers",
        ),
    ],
)  # fmt: skip
def test_problems(row: dict[str, Any], kind: ProblemKind, words: str) -> None:
    with pytest.raises(RowProblem) as caught:
        parse_row(row)

    assert caught.value.kind is kind
    assert words in caught.value.detail


def test_malformed_and_unusable_are_told_apart() -> None:
    expected_malformed = {ProblemKind.BAD_JSON, ProblemKind.MISSING_COLUMN, ProblemKind.WRONG_TYPE}

    assert {kind for kind in ProblemKind if kind.malformed} == expected_malformed


#: That none of four pairs is a labelled answer.
PAIRS = np.full(4, -1, np.int8)


def test_report_stays_short_and_survives_json() -> None:
    report = DataReport([f"source{i}.jsonl" for i in range(40)])
    for source in range(40):
        outcome = Outcome(read=len(ProblemKind), unread={f"column {i}": 3 for i in range(40)})
        for kind in ProblemKind:
            outcome.add_problem(7, kind, "detail")
        report.add(source, 0, outcome)
    report.set_lengths(np.array([[10, 4, 6], [30, 5, 5]], np.int32), np.array([[0, 10, 14], [20, 50, 55]]), PAIRS[:2])

    assert len(report.format().splitlines()) <= 20
    assert report.prompt_token_share == 40 / 60
    assert dataclasses.astuple(report.tokens["prompt"]) == (20.0, 20.0, 29.0, 30)
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_report_of_groups() -> None:
    """A prompt and an answer of several pairs are there once; so are their tokens."""
    report, outcome = DataReport(["rows.jsonl"]), Outcome(read=5, rows=3)
    for row in (1, 1, 2, 1):
        outcome.add_spelled_out("<|im|>", 1, [row])
    report.add(0, 4, outcome)
    lengths = np.array([[10, 4, 6], [10, 4, 5], [10, 6, 5], [30, 5, 5]], np.int32)
    report.set_lengths(lengths, np.array([[0, 10, 14], [0, 10, 20], [0, 14, 20], [25, 55, 60]]), PAIRS)
    assert report.groups == 2 and report.prompt_token_share == 40 / 65
    pairs, spelled_out = report.format().splitlines()[:2]
    assert pairs == "pairs: 4 in 2 groups kept of 5 pairs of 3 rows (0 dropped, 0.00%)"
    assert spelled_out.endswith("<|im|> in 4 (row 1, 2)"), "each row once, however many pairs it gives"


def test_margin() -> None:
    row = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}
    assert parse_row(row | {"margin": 2}).margin == 2.0
    assert parse_row(row | {"margin": None}).margin is None
    for wrong in ("2", True, math.nan, math.inf, [1.0]):
        with pytest.raises(RowProblem, match=r"column 'margin' is .*; a finite number is needed"):
            parse_row(row | {"margin": wrong})
