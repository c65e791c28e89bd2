"""Pairs of one row: tokenized, stored and found again as a group, whose prompt and answers are there once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.row_reader import FormatSettings, row_readers
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
from megatron_bdpo.data.tokenization import PairTokenizer, PairTokens
from megatron_bdpo.data.tokenized_rows import RowsBuilder, TokenizedRows, join
from megatron_bdpo.data.tokenizing import RowTokenizer
from megatron_bdpo.errors import UserError
from tests.unit.data.test_store import write

RECORD = PreferenceRecord("", "", "")


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def mask(text: str) -> Any:
    """A letter for each token that is scored."""
    return np.array([each != "-" for each in text])


def built(*pairs: tuple[int, PairTokens]) -> TokenizedRows:
    builder = RowsBuilder()
    for row, pair in pairs:
        builder.append(pair, row, RECORD)
    return builder.finish()


def contents(rows: TokenizedRows) -> list[list[list[int]]]:
    """Of each pair its parts, cut out of the tokens."""
    places = zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)
    return [
        [rows.tokens[start : start + length].tolist() for start, length in zip(*each, strict=True)] for each in places
    ]


# In memory ------------------------------------------------------------------------------------------------------------

P, Q, A, B, C = ids(1, 2), ids(1), ids(3, 4, 5), ids(6), ids(7, 8)


def test_answers_of_a_row_are_kept_once():
    rows = built((1, PairTokens(P, A, B)), (1, PairTokens(P, A, C)), (1, PairTokens(P, C, B)))
    assert rows.tokens.tolist() == [*P, *A, *B, *C]
    assert rows.starts.tolist() == [[0, 2, 5], [0, 2, 6], [0, 6, 5]]
    assert contents(rows) == [[list(each) for each in pair] for pair in ((P, A, B), (P, A, C), (P, C, B))]


def test_rows_share_nothing():
    """Not even the same ones: each is drawn by itself."""
    rows = built((1, PairTokens(P, A, B)), (2, PairTokens(P, A, B)))
    assert rows.tokens.tolist() == [*P, *A, *B] * 2 and rows.starts[:, 0].tolist() == [0, 6]


def test_other_prompts_of_a_row_are_other_groups():
    rows = built((1, PairTokens(P, A, B)), (1, PairTokens(Q, A, B)))
    assert rows.tokens.tolist() == [*P, *A, *B, *Q, *A, *B] and rows.starts[:, 0].tolist() == [0, 6]


def test_an_answer_that_is_scored_otherwise_is_another():
    """All of it, or not; the stretches that are not are kept with the tokens that they are of."""
    first, second = mask("--x"), mask("x--")
    rows = built(
        (1, PairTokens(P, A, B, first)),
        (1, PairTokens(P, A, C, second)),
        (1, PairTokens(P, A, C)),
        (1, PairTokens(P, C, A, None, first)),
    )
    assert rows.tokens.tolist() == [*P, *A, *B, *A, *C, *A]
    assert rows.context.tolist() == [[2, 4], [7, 9]]
    assert rows.starts[:, 1:].tolist() == [[2, 5], [6, 9], [11, 9], [9, 2]]


def test_own_unconditional_prompts_divide_a_row():
    builder = RowsBuilder()
    for own in (None, ids(9), ids(9)):
        builder.append(PairTokens(P, A, B), 1, RECORD, own)
    rows = builder.finish()
    assert rows.starts[:, 0].tolist() == [0, 6, 6] and rows.prompt_of.tolist() == [-1, 0, 0]


def test_parts_that_are_joined_keep_their_groups():
    pairs = (PairTokens(P, A, B, mask("-xx")), PairTokens(P, C, B))
    both = join([built(*((1, pair) for pair in pairs)), built(*((2, pair) for pair in pairs))])
    assert both.starts[:, 0].tolist() == [0, 0, 8, 8] and both.context.tolist() == [[2, 3], [10, 11]]
    assert contents(both) == [[part.tolist() for part in pair.parts] for pair in pairs] * 2


# From rows ------------------------------------------------------------------------------------------------------------


def ranked(*responses: Any, prompt: Any = "1", **more: Any) -> dict[str, Any]:
    """The first answer is the best."""
    return {"prompt": prompt, "responses": responses, "ranks": [*range(len(responses))], **more}


@pytest.fixture(scope="session")
def numbers(megatron_tokenizer: Callable[..., Any]) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=100))


@pytest.fixture(scope="session")
def chats(megatron_tokenizer: Callable[..., Any], qwen_like: Path) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like)))


def settings_of(path: Path, *rows: dict[str, Any], **more: Any) -> PairDataSettings:
    source = write(path / "rows.jsonl", list(rows))
    return PairDataSettings((source,), path / "cache", form=FormatSettings.parse(pairs_from="all"), **more)


def test_equal_answers_are_not_compared_and_the_others_stay(tmp_path: Path, numbers: PairTokenizer) -> None:
    store = prepare_pairs(settings_of(tmp_path, ranked(" 2", " 3", " 2")), numbers)
    assert [[part.tolist() for part in store.pair(i).parts] for i in range(len(store))] == [
        [[1], [2, 99], [3, 99]],
        [[1], [3, 99], [2, 99]],
    ]
    assert store.starts.tolist() == [[0, 1, 3], [0, 3, 1]]
    assert [each.kind for each in store.report.problems] == ["IDENTICAL_RESPONSES"]


def test_a_limit_of_pairs_cuts_a_group(tmp_path: Path, numbers: PairTokenizer) -> None:
    """What is left is the beginning of all: scores that are kept of either are those of the other."""
    rows = ranked(" 2", " 3", " 4"), ranked(" 5", " 6", " 7", prompt="8")
    whole = prepare_pairs(settings_of(tmp_path, *rows), numbers)
    some = prepare_pairs(settings_of(tmp_path, *rows, max_pairs=4), numbers)
    assert len(whole) == 6 and len(some) == 4
    for name in ("starts", "lengths", "row"):
        assert np.array_equal(getattr(some, name), getattr(whole, name)[:4])
    assert PairPool([some]).grouping.first_pair.tolist() == [0, 3, 4]


def turns(*texts: str) -> list[dict[str, str]]:
    """The assistant begins."""
    return [{"role": ("assistant", "user")[place % 2], "content": text} for place, text in enumerate(texts)]


def test_answers_of_several_turns_that_begin_alike(tmp_path: Path, chats: PairTokenizer) -> None:
    """What a pair's two begin with belongs to its prompt alone: it is a group beside that of the others."""
    answers = turns("x", "u", "a"), turns("y", "u", "b"), turns("x", "u", "c"), turns("z")
    row = ranked(*answers, prompt=[{"role": "user", "content": "q"}])
    settings = settings_of(tmp_path, row)
    store = prepare_pairs(settings, chats)
    pool = PairPool([store])
    assert np.diff(pool.grouping.first_pair).tolist() == [5, 1]
    assert [len(pool.group(group).group.answers) for group in (0, 1)] == [4, 2]
    one_by_one = [
        {"prompt": row["prompt"], "chosen": answers[a], "rejected": answers[b]}
        for a, b in ((0, 1), (0, 3), (1, 2), (1, 3), (2, 3), (0, 2))
    ]
    source = write(tmp_path / "pairs.jsonl", one_by_one)
    expected = prepare_pairs(PairDataSettings((source,), tmp_path / "cache"), chats)
    assert np.array_equal(store.scored, expected.scored)
    for index in range(6):
        for found, part in zip(store.pair(index).parts, expected.pair(index).parts, strict=True):
            assert np.array_equal(found, part)
        for found, part in zip(store.pair(index).scored, expected.pair(index).scored, strict=True):
            assert (found is None and part is None) or np.array_equal(found, part)
    limited = prepare_pairs(dataclasses.replace(settings, max_pairs=3), chats)
    assert np.array_equal(limited.lengths, store.lengths[:3]), "a limit does not change which pairs come first"


def test_each_answer_is_encoded_once(tmp_path: Path, chats: PairTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_all, encoded = chats._encoder.encode_all, []
    monkeypatch.setattr(chats._encoder, "encode_all", lambda texts: encoded.extend(texts) or encode_all(texts))
    row = ranked("a b", "c", "d", "e", prompt=[{"role": "user", "content": "q"}])
    settings = settings_of(tmp_path, row)
    work, lines = RowTokenizer(chats, row_readers(settings.sources, settings.form)), [(1, json.dumps(row).encode())]
    assert len(work(0, lines)) == 6
    assert len(encoded) == len(set(encoded)) == 2 + 4, "the prompt in two parts, and the answers"
    work(0, lines)
    assert len(encoded) == 12, "nothing is kept from row to row"


def test_each_conversation_is_rendered_once(tmp_path: Path, chats: PairTokenizer, monkeypatch) -> None:
    """A prompt and four answers, in six pairs. Nothing is kept from row to row."""
    row = ranked("a b", "c", "d", "e", prompt=[{"role": "user", "content": "q"}])
    settings, line = settings_of(tmp_path, row), json.dumps(row).encode()
    work = RowTokenizer(chats, row_readers(settings.sources, settings.form))
    expected = work(0, [(1, line)])  # which also renders what is asked of the template itself
    rendered, texts = chats.template._rendered, []
    monkeypatch.setattr(chats.template, "_rendered", lambda *a, **k: texts.append(rendered(*a, **k)) or texts[-1])
    for times in (1, 2):
        assert np.array_equal(work(0, [(times, line)]).tokens, expected.tokens)
        assert len(texts) == times * (1 + 4) and len(set(texts)) == 1 + 4


# On disk --------------------------------------------------------------------------------------------------------------


def stored(directory: Path, rows: TokenizedRows) -> PairStore:
    directory.mkdir()
    source = SourceSpec("rows.jsonl")
    with PairStoreWriter(directory) as writer:
        writer.extend(rows, 0)
        writer.finish(StoreInfo("0", {}, [0], (source,), DataReport([source.path])))
    return PairStore.open(directory)


def test_scored_tokens_of_shared_answers(tmp_path: Path) -> None:
    """Counted, and masked, wherever the answer lies and whichever side it is on."""
    rows = built(
        (1, PairTokens(P, A, C, mask("x-x"), mask("-x"))),
        (1, PairTokens(P, C, B, mask("-x"))),
        (1, PairTokens(P, B, A, None, mask("x-x"))),
        (2, PairTokens(P, A, B)),
    )
    store = stored(tmp_path / "store", join([rows, rows]))
    assert store.scored.tolist() == [[2, 1], [1, 1], [1, 2], [3, 1]] * 2
    for index in range(len(store)):
        for tokens, scored, count in zip(
            store.pair(index).parts[1:], store.pair(index).scored, store.scored[index], strict=True
        ):
            assert (len(tokens) if scored is None else int(scored.sum())) == count
    assert store.pair(6).scored[1].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("name", "column", "change", "words"),
    [
        ("starts", 0, [3, 0, 6], "its groups are not in order"),
        ("starts", 1, [10, 10, 10], "do not end where the tokens do"),
        ("starts", 2, [-1, 5, 5], "do not end where the tokens do"),
        ("row", None, [1, 2, 2], "not of one row and prompt"),
        ("lengths", 0, [2, 1, 2], "not of one row and prompt"),
        ("prompt_of", None, [0, -1, -1], "not of one row and prompt"),
    ],
)
def test_groups_that_cannot_be(tmp_path: Path, name: str, column: int | None, change: list[int], words: str) -> None:
    """Where the checksums are right, as of a store that another program wrote."""
    rows = built((1, PairTokens(P, A, B)), (1, PairTokens(P, B, A)), (2, PairTokens(P, A, B)))
    rows = dataclasses.replace(rows, own_prompts=ids(5), own_lengths=ids(1))
    stored(tmp_path / "whole", rows)
    array = getattr(rows, name).copy()
    array[..., column if column is not None else slice(None)] = change
    with pytest.raises(UserError, match=f"damaged: .*{words}"):
        stored(tmp_path / "damaged", dataclasses.replace(rows, **{name: array}))


def test_the_order_of_a_file_of_pairs_is_kept(tmp_path: Path, numbers: PairTokenizer) -> None:
    """Rows of one pair each, of one prompt: as many groups."""
    rows = [{"prompt": "1", "chosen": f" {i}", "rejected": " 9"} for i in (5, 3, 4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = prepare_pairs(PairDataSettings((SourceSpec(str(path)),), tmp_path / "cache"), numbers)
    assert [int(store.pair(i).chosen[0]) for i in range(3)] == [5, 3, 4]
    assert len(PairPool([store]).grouping) == 3
