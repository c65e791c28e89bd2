"""Prompts to be answered: how rows are read, and what is fed to a model until their answers end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.data.answering import GreedyAnswers
from megatron_bdpo.data.prompts import encode_prompts, read_prompts
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.errors import UserError
from tests.unit.conftest import CHATML_TEMPLATE, LLAMA_TEMPLATE, OPEN_TEMPLATE

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Reading --------------------------------------------------------------------------------------------------------------


def test_prompts_with_their_other_columns(tmp_path):
    """A row of pair data is one, too."""
    path = write(
        tmp_path / "ask.jsonl",
        {"prompt": "Hi", "kind": "harmless"},
        {"prompt": MESSAGES, "chosen": "a", "rejected": ["b"], "score": None},
    )
    rows = read_prompts(path)
    assert [row.prompt for row in rows] == ["Hi", MESSAGES]
    assert [row.columns for row in rows] == [
        {"kind": "harmless"},
        {"chosen": "a", "rejected": ["b"], "score": None},
    ]
    assert rows[1].where == f"{path}, line 2"


def test_an_empty_file(tmp_path):
    with pytest.raises(UserError, match=r"--eval-prompts: .* is empty"):
        read_prompts(write(tmp_path / "ask.jsonl"))


@pytest.fixture
def build(megatron_tokenizer, qwen_like):
    """A tokenizer with a template."""

    def tokenizer(template: str = CHATML_TEMPLATE) -> PairTokenizer:
        return PairTokenizer(
            megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like), chat_template=template)
        )

    return tokenizer


def encoded(tokenizer: PairTokenizer, path: str, *, chats: bool):
    return encode_prompts(read_prompts(path), tokenizer, path, chats=chats, longest=4, room=100)


def test_a_string_is_what_it_is_beside_the_pairs(build, tmp_path):
    """Text beside texts; beside chats a turn of the user, which is written out in the second row."""
    path = write(tmp_path / "ask.jsonl", {"prompt": MESSAGES[0]["content"]}, {"prompt": MESSAGES})
    tokenizer = build()
    as_chat, as_text = encoded(tokenizer, path, chats=True), encoded(tokenizer, path, chats=False)
    assert as_chat.tokens[0].tolist() == as_chat.tokens[1].tolist() == as_text.tokens[1].tolist()
    assert len(as_text.tokens[0]) < len(as_text.tokens[1])
    assert as_chat.ends[0] == as_chat.ends[1] == as_text.ends[1]


# Its end is several tokens, none of them special.
STOP_TEMPLATE = OPEN_TEMPLATE.replace("{{ '\n' if", "{{ ' STOP' if m['role'] == 'assistant' }}{{ '\n' if")


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, LLAMA_TEMPLATE, OPEN_TEMPLATE, STOP_TEMPLATE])
def test_prompts_and_ends_are_those_of_pairs(build, template):
    """Of a pair as it is tokenised for training: the same prompt, and the response comes to an end at its own end."""
    from megatron_bdpo.data.records import PreferenceRecord

    tokenizer = build(template)
    answers = [[{"role": "assistant", "content": text}] for text in ("Paris, of course.", "Maybe not")]
    pair = tokenizer.encode(PreferenceRecord(MESSAGES, *answers))
    assert tokenizer.encode_prompt(MESSAGES).tolist() == pair.prompt.tolist()
    for response, expected in zip(pair.parts[1:], ("Paris, of course.", "Maybe not"), strict=True):
        made = said_by(response.tolist(), tokenizer.ends(chat=True))
        assert made.finished == [True]
        assert tokenizer.text(made.without_end(0)).strip() == expected


def test_ends(build):
    """EOD alone, once, where the template's end is the same or nothing."""
    for template, chat, expected in ((CHATML_TEMPLATE, False, 1), (CHATML_TEMPLATE, True, 1), (STOP_TEMPLATE, True, 2)):
        ends = build(template).ends(chat=chat)
        assert ends[0] == [build()._end] and len(ends) == expected
    assert build().text(ends[1]).strip() == "STOP" and len(ends[1]) > 1


def said_by(tokens: list[int], ends: list[list[int]]) -> GreedyAnswers:
    """The answer of a model that says these tokens, whatever it is asked."""
    answers = GreedyAnswers([np.array([1], np.int32)], [ends], len(tokens), 1)
    said = iter(tokens)
    while not answers.done:
        answers.next_packs(64, 8)
        answers.take([next(said)])
    return answers


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(build):
    tokenizer = build()
    (known,) = (tokenizer._encoder.encode("a"),)
    assert tokenizer.text([*known, 10**6]) == "a"


# Answering ------------------------------------------------------------------------------------------------------------


def counts_on(prompts: list[int], microbatches: int, limit: int, longest: int) -> GreedyAnswers:
    """Answers of a model that attends as the packs say: it says how many keys the last token of a sequence sees.

    Every key is kept as the token it belongs to, so that each sequence is checked to see its own and nothing else.
    """
    sequences = [np.full(length, 100 + index, np.int32) for index, length in enumerate(prompts)]
    answers = GreedyAnswers(sequences, [[[-1]]] * len(prompts), longest, microbatches)
    kept = [np.zeros(0, np.int64) for _ in range(microbatches)]
    owner = [np.zeros(0, np.int64) for _ in range(microbatches)]
    while not answers.done:
        packs, said = answers.next_packs(limit, 8), []
        assert len(packs) == microbatches and len({len(pack.tokens) for pack in packs}) == 1
        assert len(packs[0].tokens) <= limit and len(packs[0].tokens) % 8 == 0
        for place, pack in enumerate(packs):
            fed = [answers._fed[len(said) + run] for run in range(len(pack.query_lengths))]
            kept[place] = np.concatenate([pack.positions[: pack.used], kept[place]])
            owner[place] = np.concatenate([np.repeat(fed, pack.query_lengths), owner[place]]).astype(np.int64)
            ends = np.cumsum(pack.key_lengths)
            for index, end, keys in zip(fed, ends, pack.key_lengths, strict=True):
                seen = pack.key_index[end - keys : end]
                assert (owner[place][seen] == index).all()
                assert (kept[place][seen] == np.arange(keys)).all()
            said += pack.key_lengths.tolist()
            assert pack.scored_hidden.tolist() == (np.cumsum(pack.query_lengths) - 1).tolist()
        answers.take(said)
    return answers


@pytest.mark.parametrize(("microbatches", "limit"), [(1, 512), (2, 512), (4, 64), (1, 48), (3, 40)])
def test_every_sequence_sees_its_own_tokens_in_their_order(microbatches, limit):
    prompts = [3, 40, 1, 17, 30]
    answers = counts_on(prompts, microbatches, limit, longest=6)
    assert answers.answers == [list(range(length, length + 6)) for length in prompts]
    assert answers.finished == [False] * 5


def test_an_answer_ends_with_any_of_its_ends():
    answers = said_by([5, 6, 7, 9], [[9], [6, 7]])
    assert answers.answers == [[5, 6, 7]] and answers.finished == [True]
    assert answers.without_end(0) == [5]
