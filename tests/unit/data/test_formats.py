"""Every format of pairs from its published form: recognised, converted, read; and what is wrong with bad rows of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data import formats
from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import parse_row
from tests.unit.data.format_examples import (
    AS_THEY_ARE,
    EXAMPLES,
    EXPECTED,
    assistant,
    call,
    calls,
    example,
    graded,
    reader,
    tool,
    user,
)
from tests.unit.data.test_any_rows import any_json

EVERY_ROW = [
    (name, index) for name in formats.NAMES for index in range(len((EXAMPLES / f"{name}.jsonl").open().readlines()))
]


#: Formats of one answer and a label.
LABELLED = {"unpaired", *(name for name in formats.NAMES if name.endswith("-kto"))}


def test_every_format_has_an_example_and_an_expectation():
    assert {path.stem for path in EXAMPLES.iterdir()} == set(formats.NAMES) == AS_THEY_ARE | set(EXPECTED)


@pytest.mark.parametrize(("name", "index"), EVERY_ROW)
def test_published_form(name, index):
    """Recognised, converted as expected, and nothing of it is left unsaid."""
    row = example(name, index)
    before = json.dumps(row)
    found = formats.recognise(row)
    assert found is not None and found.name == name
    expected = [row] if name in AS_THEY_ARE else EXPECTED[name][index]
    assert found.rows(row, FormatOptions()) == expected
    assert json.dumps(row) == before, "the row was changed"
    assert found.unread(row) == []
    assert found.unread(row | {"strange": 1, "empty": None}) == ["strange"]
    assert not set(found.reads) & set(found.ignores)


def reads_tool_calls() -> bool:
    try:
        parse_row({"prompt": [user("a"), calls("Oslo"), tool("2")], "chosen": "b", "rejected": "c"})
    except RowProblem:
        return False
    return True


@pytest.mark.parametrize(("name", "index"), EVERY_ROW)
def test_the_rows_are_records(name, index):
    rows = reader(name).records(example(name, index))
    if "tool_calls" in json.dumps(rows) and not reads_tool_calls():
        pytest.skip("tool calls are not read yet")
    for row in rows:
        record = parse_row(row)
        assert (record.chosen == record.rejected) == (record.label is not None) == (name in LABELLED)
        assert record.is_chat or name in ("trl", "hh-rlhf", "openrlhf", "responses", "unpaired", "openrlhf-kto")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_column_that_is_missing_is_named(name):
    """Whatever column of those without which the example gives another pair."""
    row = example(name)
    optional = (
        {"system", "history", "input", "tools", "responses_safe", "ref_logps"} if name != "openrlhf" else {"margin"}
    )
    needed = [column for column in formats.named(name).reads if column in row and column not in optional]
    needed = [column for column in needed if not column.startswith(("is_response", "safer"))]
    assert len(needed) >= 2
    for column in needed:
        for broken in (
            {key: value for key, value in row.items() if key != column},
            row | {column: None},
            row | {column: {}},
            row | {column: []},
        ):
            with pytest.raises(RowProblem) as caught:
                for made in reader(name).records(broken):
                    parse_row(made)
            assert caught.value.kind.malformed or column == "overall_preference" or broken.get(column) == []
            assert f"'{column}'" in caught.value.detail or column in ("chosen", "rejected")


TIED, UNRANKED, WRONG = ProblemKind.TIED, ProblemKind.UNRANKED, ProblemKind.WRONG_TYPE
TURNS = ProblemKind.NO_ASSISTANT_TURN


@pytest.mark.parametrize(
    ("name", "changes", "kind", "words"),
    [
        ("nectar", {"answers": graded(1, 1, 1)}, TIED, "'rank' 1"),
        ("nectar", {"answers": graded(1)}, UNRANKED, "'answers' holds 1"),
        ("nectar", {"answers": graded(1, None)}, UNRANKED, "answer 2 has no 'rank'"),
        ("nectar", {"answers": graded(1, float("nan"))}, UNRANKED, "answer 2 has no 'rank'"),
        ("nectar", {"answers": graded(1, "second")}, WRONG, "'rank' of answer 2 is str"),
        ("nectar", {"answers": graded(1, True)}, WRONG, "'rank' of answer 2 is bool"),
        (
            "nectar",
            {"answers": [{"rank": 1}, {"rank": 2}]},
            ProblemKind.MISSING_COLUMN,
            "'answer' is missing; answer 1",
        ),
        ("nectar", {"answers": ["a", "b"]}, WRONG, "'answers'"),
        ("nectar", {"prompt": "\n\nAssistant: a\n\nHuman: b\n\nAssistant: "}, WRONG, "'prompt' is no dialogue"),
        ("nectar", {"prompt": "\n\nHuman: b\n\nAssistant: Sure"}, WRONG, "'prompt' is no dialogue"),
        ("nectar", {"prompt": "\n\nHuman: b"}, WRONG, "'prompt' is no dialogue"),
        ("helpsteer3", {"overall_preference": 0}, TIED, "'overall_preference' is 0"),
        ("helpsteer3", {"overall_preference": None}, UNRANKED, "no 'overall_preference'"),
        ("helpsteer3", {"overall_preference": "1"}, WRONG, "'overall_preference' of the row is str"),
        ("pku-saferlhf", {"better_response_id": 2}, WRONG, "'better_response_id' is 2"),
        ("pku-saferlhf", {"better_response_id": "1"}, WRONG, "'better_response_id' is '1'"),
        ("pku-saferlhf", {"is_response_0_safe": "no"}, WRONG, "'no'"),
        ("ms-swift", {"messages": [user("a")]}, TURNS, "'messages'"),
        ("ms-swift", {"messages": [assistant("a")]}, TURNS, "'messages'"),
        ("ms-swift", {"rejected_messages": [user("a")]}, WRONG, "both 'rejected_messages' and 'rejected_response'"),
        ("ms-swift", {"system": "Another."}, WRONG, "'system' and the first message"),
        ("sharegpt", {"conversations": [user("a"), assistant("b")]}, TURNS, "'conversations' ends with"),
        ("sharegpt", {"conversations": [{"from": "bing", "value": "a"}]}, WRONG, "message 1 is from 'bing'"),
        ("sharegpt", {"conversations": [{"value": "a"}]}, WRONG, "'conversations', message 1 is dict"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, WRONG, "no call in JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[3]"}]}, WRONG, "no call with a 'name'"),
        ("sharegpt", {"chosen": 3}, WRONG, "'chosen' is int"),
        ("axolotl", {"rejected": {"content": "x"}}, WRONG, "'rejected', message 1"),
        ("alpaca", {"history": [["only a question"]]}, WRONG, "'history', turn 1"),
        ("alpaca", {"history": "none"}, WRONG, "'history' is str"),
        ("alpaca", {"input": 3}, WRONG, "'input' is int"),
        ("orca", {"system": 3}, WRONG, "'system' is int"),
        ("openrlhf", {"chosen": "Wood."}, ProblemKind.IDENTICAL_RESPONSES, "the same"),
    ],
)
def test_bad_rows(name, changes, kind, words):
    with pytest.raises(RowProblem) as caught:
        for row in reader(name).records(example(name) | changes):
            parse_row(row)
    assert caught.value.kind is kind
    assert words in caught.value.detail


# What rows bring along -----------------------------------------------------------------------------------------------


def test_fields_of_messages_and_columns_for_the_template_stay():
    thought = {**assistant("b"), "reasoning_content": "hm", "tool_calls": [call("Oslo")], "name": "Ann"}
    row = {
        "messages": [{**user("a"), "name": "Bob"}],
        "chosen": thought,
        "rejected": {"from": "gpt", "value": "c", "weight": 0.5},
        "tools": [{"name": "weather"}],
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "chosen_safe": 0,
        "ref_chosen_logps": -1.5,
    }
    (made,) = reader("axolotl").records(row)
    assert made == {
        "prompt": row["messages"],
        "chosen": [thought],
        "rejected": [{**assistant("c"), "weight": 0.5}],
        **{name: row[name] for name in row if name not in ("messages", "chosen", "rejected")},
    }


@pytest.mark.parametrize("name", formats.NAMES)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_values_in_the_columns(name, data):
    """A row or a counted problem, never anything else."""
    kind = formats.named(name)
    row = dict(example(name))
    for column in data.draw(st.lists(st.sampled_from(sorted(set(kind.reads) & set(row))), max_size=2)):
        row[column] = data.draw(any_json)
    way = data.draw(st.sampled_from(("best-worst", "all", "adjacent")))
    formats.recognise(row)
    try:
        for made in kind.rows(row, FormatOptions(way)):
            if not isinstance(made, RowProblem):
                parse_row(made)
    except RowProblem as problem:
        assert problem.detail.isprintable()
