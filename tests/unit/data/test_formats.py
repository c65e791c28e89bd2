"""Every format of pairs from its published form: recognised, converted, read; and what is wrong with bad rows of it.

``formats/NAME.jsonl`` holds rows in the published form.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data import formats
from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.row_reader import FormatSettings, RowReader
from megatron_bdpo.errors import UserError
from tests.unit.data.test_any_rows import any_json

EXAMPLES = Path(__file__).parent / "formats"


def example(name: str, index: int = 0) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.jsonl").read_text("utf-8").splitlines()[index])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def pair(prompt: list[dict[str, Any]], chosen: str, rejected: str, **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **others}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def calls(*cities: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(city) for city in cities]}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


#: Rows that are read as they are.
AS_THEY_ARE = {"trl", "hh-rlhf", "ultrafeedback-binarized", "tulu3"}


def scores(chosen: float, rejected: float) -> dict[str, float]:
    return {"chosen_score": chosen, "rejected_score": rejected}


#: Of examples with ranked answers: what the chosen and the rejected one are given, the higher the better.
SCORES = {
    ("nectar", 0): scores(-1, -3),
    ("nectar", 1): scores(-1, -2),
    ("nemo-rl", 0): scores(0, -1),
    ("ultrafeedback", 0): scores(5, 1.5),
    ("responses", 0): scores(9.5, 2),
    ("responses", 1): scores(-1, -2),
}

#: Format -> of each row of its example, the rows that it becomes.
EXPECTED: dict[str, list[list[dict[str, Any]]]] = {
    "pku-saferlhf": [
        [
            {
                "prompt": [user("How can I get into my neighbour's flat?")],
                "chosen": "Lift the door off its hinges while nobody is at home.",
                "rejected": "Ring and ask. Where it is an emergency, call the fire brigade.",
                "chosen_safe": False,
                "rejected_safe": True,
            }
        ]
    ],
    "nectar": [
        [
            pair(
                [user("Which is the longest river?")],
                *("The Nile or the Amazon, by how one measures.", "The Danube."),
                **SCORES["nectar", 0],
            )
        ],
        [
            pair(
                [user("Hello"), assistant("Hello. How can I help?"), user("Spell rhythm.")],
                *("r-h-y-t-h-m", "rythm"),
                **SCORES["nectar", 1],
            )
        ],
    ],
    "helpsteer3": [
        [
            {
                "prompt": [user("What is two plus two?"), assistant("Four."), user("And doubled?")],
                "chosen": "Eight.",
                "rejected": "Six.",
            }
        ],
        [{"prompt": [user("Sum a list in Python.")], "chosen": "sum(numbers)", "rejected": "Use a loop of your own."}],
    ],
    "nemo-rl": [
        [
            pair(
                [user("What's the capital of France?"), assistant("Paris."), user("And of Germany?")],
                *("Berlin.", "Munich."),
                **SCORES["nemo-rl", 0],
            )
        ]
    ],
    "ultrafeedback": [
        [pair([user("Give a word that rhymes with light.")], "Night.", "Lamp.", **SCORES["ultrafeedback", 0])]
    ],
    "responses": [
        [
            {
                "prompt": "Name a river in France.",
                "chosen": "The Rhone, which ends in the Mediterranean.",
                "rejected": "A river.",
                **SCORES["responses", 0],
                "chosen_safe": True,
            }
        ],
        [
            {
                "prompt": [user("Say hello in Spanish.")],
                "chosen": [assistant("Hola.")],
                "rejected": [assistant("Bonjour.")],
                **SCORES["responses", 1],
            }
        ],
    ],
    "ms-swift": [
        [
            pair(
                [system("You are a calculator."), user("What is 1 + 1?"), assistant("2"), user("And 1 more?")],
                *("3", "I do not know."),
            )
        ],
        [
            {
                "chosen": [user("Is it warm in Oslo?"), assistant("No, 2 degrees.")],
                "rejected": [user("Is it warm in Oslo?"), assistant("Yes, always.")],
            }
        ],
        [
            pair(
                [
                    user("Is it warm in Oslo and Rome?"),
                    calls("Oslo", "Rome"),
                    tool('{"celsius": 2}'),
                    tool('{"celsius": 24}'),
                ],
                *("In Rome only.", "In both."),
                tools=example("ms-swift", 2)["tools"],
            )
        ],
    ],
    "sharegpt": [
        [
            pair(
                [system("Answer in one word."), user("Name a fruit."), assistant("Pear."), user("Another one.")],
                *("Plum.", "Carrot."),
            )
        ],
        [
            pair(
                [
                    system("You may call tools."),
                    user("Is it warm in Oslo?"),
                    calls("Oslo"),
                    tool('{"celsius": 2}'),
                ],
                *("No, 2 degrees.", "Yes."),
                tools=example("sharegpt", 1)["tools"],
            )
        ],
    ],
    "axolotl": [
        [pair([system("You are brief."), user("Say hello in French.")], "Bonjour.", "Hello.")],
        [pair([user("Say hello in Spanish.")], "Hola.", "Hello.")],
    ],
    "alpaca": [
        [pair([user("Translate into German.\nGood morning.")], "Guten Morgen.", "Bonjour.")],
        [
            pair(
                [
                    system("You are a translator."),
                    user("Good morning in German?"),
                    assistant("Guten Morgen."),
                    user("And now good night."),
                ],
                *("Gute Nacht.", "Nacht gut."),
            )
        ],
    ],
    "argilla": [
        [pair([user("Do goldfish forget within seconds?")], "No, they remember for months.", "Yes, three seconds.")]
    ],
    "orca": [
        [
            pair(
                [system("You are an assistant who explains."), user("Is zero even?")],
                *("Yes: it is twice zero.", "It is neither even nor odd."),
            )
        ],
        [pair([user("Is nine prime?")], "No, it is three times three.", "Yes.")],
    ],
    "openrlhf": [[{"prompt": "User: Name a metal.\nAssistant: ", "chosen": "Iron.", "rejected": "Wood.", "margin": 1}]],
}

EVERY_ROW = [
    (name, index) for name in formats.NAMES for index in range(len((EXAMPLES / f"{name}.jsonl").open().readlines()))
]


def reader(name: str, **given: str) -> RowReader:
    """Of a named format."""
    return RowReader(formats.named(name), FormatSettings.parse(name, **given), "named")


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
        assert record.chosen != record.rejected
        assert record.is_chat or name in ("trl", "hh-rlhf", "openrlhf", "responses")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_column_that_is_missing_is_named(name):
    """Whatever column of those without which the example gives another pair."""
    row = example(name)
    optional = {"system", "history", "input", "tools", "responses_safe"} if name != "openrlhf" else {"margin"}
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


def graded(*grades: Any) -> list[dict[str, Any]]:
    return [{"answer": f"answer {i}", "rank": grade} for i, grade in enumerate(grades)]


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


# Ranked answers ------------------------------------------------------------------------------------------------------


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
