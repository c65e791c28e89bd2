"""One answer and a label: from a row to a pair of itself in the store, and what a pool makes of it beside pairs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data import formats
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.row_reader import RECOGNISED, pair_rows, row_readers
from megatron_bdpo.data.selection import Selection, refuse_labelled_answers, select
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.errors import UserError
from tests.unit.data.format_examples import assistant, example, reader, system, user

# A row to a record ---------------------------------------------------------------------------------------------------

ASK, YES, MORE = user("?"), assistant("yes"), user("and?")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"prompt": [ASK], "completion": "yes"}, [ASK], [YES]),
        ({"prompt": [ASK], "completion": [YES]}, [ASK], [YES]),
        ({"prompt": [ASK], "completion": [ASK, YES]}, [ASK], [YES]),
        ({"prompt": "?", "completion": [YES]}, [ASK], [YES]),
        ({"prompt": "?", "completion": [ASK, YES]}, [ASK], [YES]),
        ({"completion": [system("s"), ASK, YES, MORE, YES]}, [system("s"), ASK, YES, MORE], [YES]),
        ({"prompt": [ASK], "completion": [YES, MORE, YES]}, [ASK], [YES, MORE, YES]),
        ({"prompt": [ASK], "completion": [MORE, YES]}, [ASK, MORE], [YES]),
        ({"prompt": "a", "completion": " b", "chosen": None, "rejected": None}, "a", " b"),
    ],
)
def test_row_of_one_answer(row: dict[str, Any], prompt: Any, answer: Any) -> None:
    for label, expected in ((True, True), (1, True), (1.0, True), (False, False), (0, False)):
        assert parse_row(row | {"label": label}) == PreferenceRecord(prompt, answer, answer, label=expected)


def test_the_reference_of_one_answer() -> None:
    row = {"prompt": "a", "completion": " b", "label": True}
    assert parse_row(row | {"ref_logps": -2}).reference == (-2.0, -2.0)
    with pytest.raises(RowProblem, match=r"column 'ref_logps' is 1; a log-prob is needed"):
        parse_row(row | {"ref_logps": 1})


WRONG, MISSING, NO_PROMPT = ProblemKind.WRONG_TYPE, ProblemKind.MISSING_COLUMN, ProblemKind.NO_COMMON_PROMPT


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"label": None}, MISSING, "column 'label' is null"),
        ({"label": "true"}, WRONG, "column 'label' is 'true'; true or 1 (a desirable answer), false or 0"),
        ({"label": 2}, WRONG, "column 'label' is 2"),
        ({"label": -1}, WRONG, "column 'label' is -1"),
        ({"label": float("nan")}, WRONG, "column 'label' is nan"),
        ({"label": [True]}, WRONG, "column 'label' is [True]"),
        ({"completion": None}, MISSING, "column 'completion' is null"),
        ({"completion": 3}, WRONG, "column 'completion' is int"),
        ({"completion": " "}, ProblemKind.EMPTY_RESPONSE, "completion has no text"),
        ({"prompt": None}, MISSING, "column 'prompt' is null"),
        ({"prompt": None, "completion": [YES]}, NO_PROMPT, "nothing before the assistant's answer"),
        ({"prompt": "!", "completion": [ASK, YES]}, NO_PROMPT, "no message of the conversation"),
        ({"prompt": [ASK], "completion": [ASK]}, ProblemKind.NO_ASSISTANT_TURN, "completion holds"),
    ],
)
def test_bad_rows_of_one_answer(changes: dict[str, Any], kind: ProblemKind, words: str) -> None:
    with pytest.raises(RowProblem) as caught:
        parse_row({"prompt": "a", "completion": " b", "label": True} | changes)
    assert caught.value.kind is kind and words in caught.value.detail


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama-factory-kto", {"kto_tag": "true"}, "column 'kto_tag' is 'true'"),
        ("llama-factory-kto", {"conversations": [user("a")]}, "completion holds nothing"),
        ("alpaca-kto", {"kto_tag": None}, "column 'kto_tag' is null"),
        ("alpaca-kto", {"output": {"content": "x"}}, "'output', message 1"),
        ("ms-swift-kto", {"label": 3}, "column 'label' is 3"),
        ("ms-swift-kto", {"system": "Another."}, "'system' and the first message"),
        ("axolotl-kto", {"question": None}, "in none of the columns 'instruction', 'question', 'prompt'"),
        ("openrlhf-kto", {"output": 3}, "column 'output' is int"),
        ("openrlhf-kto", {"label": "1"}, "column 'label' is '1'"),
    ],
)
def test_bad_rows_of_other_forms(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RowProblem) as caught:
        for row in reader(name).records(example(name) | changes):
            parse_row(row)
    assert words in caught.value.detail


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [ASK, YES], "label": True, "rejected_response": "no"}, "ms-swift"),
        ({"prompt": "a", "completion": "b", "label": True, "chosen": "b", "rejected": "c"}, "trl"),
        ({"prompt": "a", "completion": "b", "label": True, "chosen": None, "rejected": None}, "unpaired"),
        ({"prompt": "a", "completion": "b"}, None),
        ({"instruction": "a", "input": "b", "output": "c", "label": 1}, None),
        ({"completion": "b", "label": 1}, None),
    ],
)
def test_what_is_recognised(row: dict[str, Any], name: str | None) -> None:
    found = formats.recognise(row)
    assert (found and found.name) == name


# Rows to a store -----------------------------------------------------------------------------------------------------

#: Two pairs and four labelled answers, of which the last two are one with both labels. A number is a token; EOD is 99.
ROWS: list[dict[str, Any]] = [
    {"prompt": "1 2 3", "completion": " 4 5", "label": True, "ref_logps": -1.5},
    {"prompt": "1 2", "chosen": " 3", "rejected": " 4 5 6", "ref_chosen_logps": -1, "ref_rejected_logps": -2},
    {"prompt": "7", "completion": " 8", "label": 0},
    {"prompt": "7", "chosen": " 9", "rejected": " 8"},
    {"prompt": "5", "completion": " 6 7 8 9", "label": False},
    {"prompt": "5", "completion": " 6 7 8 9", "label": 1},
]
LABELS = [1, -1, 0, -1, 0, 1]
PARTS = [([1, 2, 3], [4, 5, 99]), ([1, 2], [3, 99], [4, 5, 6, 99]), ([7], [8, 99]), ([7], [9, 99], [8, 99])]
PARTS += [([5], [6, 7, 8, 9, 99])] * 2


@pytest.fixture(scope="session")
def tokenizer(megatron_tokenizer: Callable[..., Any]) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=100))


@pytest.fixture
def make(tmp_path: Path, tokenizer: PairTokenizer) -> Callable[..., PairStore]:
    """A store of rows."""

    def store(rows: list[dict[str, Any]] = ROWS, name: str = "rows", **limits: Any) -> PairStore:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_pairs(PairDataSettings((SourceSpec(str(path)),), tmp_path / "cache", **limits), tokenizer)

    return store


def test_a_labelled_answer_is_a_pair_of_itself(make: Callable[..., PairStore]) -> None:
    store = make()
    assert store.label.tolist() == LABELS and store.label.dtype == np.int8
    for index, (prompt, chosen, *rejected) in enumerate(PARTS):
        pair = store.pair(index)
        assert [part.tolist() for part in pair.parts] == [prompt, chosen, *(rejected or [chosen])]
        assert pair.is_one_answer == (not rejected) == bool(store.starts[index, 1] == store.starts[index, 2])
    tokens = sum(len(part) for parts in PARTS for part in parts)
    assert (store.starts + store.lengths).max() == tokens, "an answer is stored once"
    assert store.reference is not None and np.isnan(store.reference[2:]).all()
    assert store.reference[:2].tolist() == [[-1.5, -1.5], [-1, -2]] and (store.unsafe == -1).all()
    report = store.report
    assert (report.desirable, report.undesirable, report.pairs_kept) == (2, 2, [6])
    assert {part: stats.mean for part, stats in report.tokens.items()} == {
        "prompt": 9 / 6, "chosen": 2, "rejected": 3, "desirable": 4, "undesirable": 3.5
    }  # fmt: skip
    assert report.prompt_token_share == 9 / tokens
    lines = report.format().splitlines()
    assert lines[0] == "pairs and labelled answers: 6 kept of 6 rows (0 dropped, 0.00%)"
    assert lines[1] == "  2 pairs, 4 labelled answers: 2 desirable (50.0%), 2 undesirable (50.0%)"
    alone = make([row for row in ROWS if "label" in row][:3], "alone").report.format().splitlines()
    assert alone[0] == "labelled answers: 3 kept of 3 rows (0 dropped, 0.00%)"
    assert alone[1] == "  1 desirable (33.3%), 2 undesirable (66.7%)"


def test_what_is_cut_is_counted_once(make: Callable[..., PairStore]) -> None:
    store = make(ROWS[:1], max_response_tokens=2)
    assert store.pair(0).is_one_answer and store.pair(0).chosen.tolist() == [4, 5]
    assert store.report.truncated_responses == 1 and store.reference is None, "its log-prob is of the whole answer"


def test_chats_of_one_answer(qwen_like: Path, megatron_tokenizer: Callable[..., Any]) -> None:
    """The tokens are those that the answer has in a pair."""
    tokenizer = PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like)))
    prompt, answer = [user("What is the capital of France?")], [assistant("Paris."), MORE, assistant("Rome.")]
    one = tokenizer.encode(parse_row({"prompt": prompt, "completion": answer, "label": True}))
    two = tokenizer.encode(parse_row({"prompt": prompt, "chosen": answer, "rejected": [assistant("no")]}))
    assert one.is_one_answer and not two.is_one_answer
    assert one.prompt.tolist() == two.prompt.tolist() and one.chosen.tolist() == two.chosen.tolist()
    assert one.chosen_scored is one.rejected_scored is not None
    assert one.chosen_scored.tolist() == two.chosen_scored.tolist()  # type: ignore[union-attr]


def test_pairs_and_labelled_answers_may_be_mixed(tmp_path: Path, make: Callable[..., PairStore]) -> None:
    """In one file whatever comes first, and in a table, where columns of the other kind are null."""
    for rows in (ROWS, ROWS[::-1], ROWS[1:], [dict.fromkeys(("chosen", "rejected", "completion")) | r for r in ROWS]):
        store = make(rows, f"rows{len(rows)}{rows[0].get('label')}{len(rows[0])}")
        assert len(store) == len(rows) and sorted(store.label.tolist()) == sorted(LABELS[-len(rows) :])
        assert not store.report.unread
    (spec,) = make().sources
    (found,) = row_readers([spec], RECOGNISED)
    assert found.unread({**ROWS[0], "chosen_safe": 1}) == ["chosen_safe"] and found.unread({**ROWS[1], "label": 1}) == [
        "label"
    ]
    assert isinstance(pair_rows({"prompt": "1", "completion": " 2"}, found)[0], RowProblem)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("label", [3, -1, 0, -1, 0, 1], "labels other than -1 to 2"),
        ("label", [-2, -1, 0, -1, 0, 1], "labels other than -1 to 2"),
        ("label", [-1, -1, 0, -1, 0, 1], "labels are not those of single answers"),
        ("label", [1, 1, 0, -1, 0, 1], "labels are not those of single answers"),
        ("label", [1, -1, 0, -1, 0], "different numbers of pairs"),
        ("lengths", [[3, 3, 2], *([len(p) for p in (*parts, parts[-1])][:3] for parts in PARTS[1:])], "single answers"),
    ],
)
def test_labels_that_do_not_fit(make: Callable[..., PairStore], column: str, values: Any, words: str) -> None:
    store = make()
    kept = getattr(store, column)
    path, meta = store.directory / f"{column}.bin", store.directory / "meta.json"
    data = np.array(values, kept.dtype)
    path.write_bytes(data.tobytes())
    told = json.loads(meta.read_text())
    told["arrays"][column] = {"rows": len(data), "crc32": zlib.crc32(data.tobytes())}
    meta.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"is damaged: .*{words}"):
        PairStore.open(store.directory)


# A store to a pool ---------------------------------------------------------------------------------------------------


def test_a_pool_holds_an_answer_once(make: Callable[..., PairStore]) -> None:
    """In sizes, in what is laid out, and in the groups of a second store."""
    pool = PairPool([make(), make(ROWS[:2], "second")])
    assert pool.pairs.label.tolist() == [*LABELS, 1, -1]
    places = np.arange(len(pool.grouping))
    expected = [*PARTS, *PARTS[:2]]
    lengths = pool.group_lengths(places)
    assert lengths.answers.tolist() == [len(parts) - 1 for parts in expected]
    assert lengths.answer_tokens.tolist() == [sum(map(len, parts[1:])) for parts in expected]
    for some in (np.array([1, 3]), np.array([0]), np.array([4, 1, 1])):  # pairs alone, one answer, both
        assert pool.group_lengths(some).answers.tolist() == [len(expected[i]) - 1 for i in some]
        assert pool.group_lengths(some).answer_squares.tolist() == [
            sum(len(each) ** 2 for each in expected[i][1:]) for i in some
        ]
    for share in (True, False):
        assert pool.sizes(share_prompts=share).tolist() == [
            len(prompt) * (1 if share else len(answers)) + sum(map(len, answers)) for prompt, *answers in expected
        ]
    for group, (prompt, *answers) in enumerate(expected):
        found = pool.group(group)
        assert found.group.prompt.tolist() == prompt and [each.tolist() for each in found.group.answers] == answers
        assert found.answers.tolist() == ([[0, 0]] if len(answers) == 1 else [[0, 1]])
    pairs, table = pool.answers_of(places)
    assert pairs.tolist() == places.tolist() and table.place.tolist()[:2] == [[0, 0], [2, 3]]


def test_a_labelled_answer_is_never_swapped(make: Callable[..., PairStore]) -> None:
    pool, selection = PairPool([make()]), Selection(np.arange(6))
    swap_all = lambda labels: (np.ones(len(labels), bool), np.ones(len(labels), bool))  # noqa: E731
    select(pool, selection, swap_all, labelled=False)
    assert pool.pairs.swapped.tolist() == [label < 0 for label in LABELS]
    assert selection.notes == ["2 pairs swapped by their safety labels, 0 dropped"]
    assert pool.pairs.reference()[1].tolist() == [-2, -1] and pool.pairs.reference()[0].tolist() == [-1.5, -1.5]


def test_losses_of_pairs_refuse_labelled_answers(make: Callable[..., PairStore]) -> None:
    pool = PairPool([make()])
    refuse_labelled_answers(pool, Selection(np.array([1, 3])), "--preference-loss dpo", ["kto"])
    with pytest.raises(UserError) as caught:
        refuse_labelled_answers(pool, Selection(np.arange(1, 6)), "--preference-loss dpo", ["kto", "bco"])
    assert str(caught.value) == (
        "--preference-loss dpo compares the answers of a pair, but 3 of 5 rows hold one answer with a label "
        f"({pool.describe(2)}). Leave these rows out, or take a loss that reads labels: kto, bco."
    )
