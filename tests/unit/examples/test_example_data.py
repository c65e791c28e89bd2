"""The example data is what its generator makes, and what its README says."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece

DATA = Path(__file__).resolve().parents[3] / "examples" / "data"
COLUMNS = {"prompt": str, "chosen": str, "rejected": str, "chosen_safe": bool, "rejected_safe": bool}


@pytest.fixture(scope="module")
def make_data() -> Iterator[ModuleType]:
    """The generator as a module: examples/ is no package, and dataclasses look their module up in sys.modules."""
    spec = importlib.util.spec_from_file_location("example_make_data", DATA / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


TRAIN, HELDOUT = read("train.jsonl"), read("heldout.jsonl")


def test_generator_reproduces_the_files(make_data: ModuleType) -> None:
    train, heldout = make_data.make_splits(make_data.read_topics(DATA / "topics.toml"))
    assert make_data.to_jsonl(train) == (DATA / "train.jsonl").read_text("utf-8")
    assert make_data.to_jsonl(heldout) == (DATA / "heldout.jsonl").read_text("utf-8")


def test_generator_reproduces_the_tokenizer(
    make_data: ModuleType, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    train, _ = make_data.make_splits(make_data.read_topics(DATA / "topics.toml"))
    model = make_data.train_tokenizer(train)
    assert model == make_data.train_tokenizer(train)
    # Pieces and not bytes: the header of the file may differ between releases of sentencepiece.
    again = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = list(range(tokenizer.get_piece_size()))
    assert again.id_to_piece(ids) == tokenizer.id_to_piece(ids)


@pytest.mark.parametrize(("pairs", "expected_count"), [(TRAIN, 396), (HELDOUT, 99)], ids=["train", "heldout"])
def test_columns_and_content(pairs: list[dict[str, Any]], expected_count: int) -> None:
    assert len(pairs) == expected_count
    for pair in pairs:
        assert {key: type(value) for key, value in pair.items()} == COLUMNS
        assert pair["prompt"].startswith("User: ")
        assert pair["prompt"].endswith("\nAssistant:")
        for response in (pair["chosen"], pair["rejected"]):
            assert response.startswith(" ")
            assert response == " " + response.strip()
            assert "  " not in response
        assert pair["chosen"] != pair["rejected"]
        assert not {"{", "}"} & set("".join((pair["prompt"], pair["chosen"], pair["rejected"])))


@pytest.mark.parametrize("pairs", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_both_labels_and_both_behaviours(pairs: list[dict[str, Any]]) -> None:
    """Neither always refusing nor never refusing wins: the two kinds of requests are equal in number."""
    assert {pair["rejected_safe"] for pair in pairs} == {True, False}
    assert all(pair["chosen_safe"] for pair in pairs)
    refusals = ("I can't", "I won't", "is not something I can", "are not something I can")
    harmful = [pair for pair in pairs if not pair["rejected_safe"]]
    needless = [
        pair
        for pair in pairs
        if pair["rejected_safe"] and pair["rejected"].startswith((" I can't", " I'm sorry", " Sorry"))
    ]
    assert len(harmful) == len(needless)
    assert all(any(word in pair["chosen"] for word in refusals) for pair in harmful)


def test_the_response_alone_does_not_tell() -> None:
    """Some whole responses are chosen after one prompt and rejected after another: one has to read the prompt."""
    assert {pair["chosen"] for pair in TRAIN} & {pair["rejected"] for pair in TRAIN}
    openings = [{pair[key].split(". ")[0] for pair in TRAIN} for key in ("chosen", "rejected")]
    assert len(openings[0] & openings[1]) >= 5


def test_splits_are_disjoint_and_without_duplicates() -> None:
    prompts = [pair["prompt"] for pair in TRAIN + HELDOUT]
    assert len(set(prompts)) == len(prompts)
    requests = [
        [prompt.rpartition("User: ")[2] for prompt in (p["prompt"] for p in pairs)] for pairs in (TRAIN, HELDOUT)
    ]
    assert not set(requests[0]) & set(requests[1])


def test_lengths_vary() -> None:
    """Packing has something to do only if they do."""
    words = sorted(len(pair[key].split()) for pair in TRAIN for key in ("chosen", "rejected"))
    assert words[0] <= 5
    assert words[-1] >= 100


def test_fillers_of_the_splits_are_disjoint(make_data: ModuleType) -> None:
    for topic in make_data.read_topics(DATA / "topics.toml"):
        assert not {tuple(f.values()) for f in topic.train} & {tuple(f.values()) for f in topic.heldout}, topic.name
        for filler in (*topic.train, *topic.heldout):
            assert filler.keys() == topic.train[0].keys(), topic.name


def test_tokenizer_special_ids(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    assert tokenizer.get_piece_size() == 1024
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, 3)


def test_tokenizer_round_trip(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Text comes back as it was, also text that was not trained on, and the prompt's boundary is a token boundary."""
    for text in ("naïve café, 12345 \t€ 漢字 🙂", "  two  spaces  ", "\n\nlines\n", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for pair in TRAIN + HELDOUT:
        prompt = tokenizer.encode(pair["prompt"])
        for response in (pair["chosen"], pair["rejected"]):
            ids = tokenizer.encode(pair["prompt"] + response)
            assert tokenizer.unk_id() not in ids
            assert tokenizer.decode(ids) == pair["prompt"] + response
            assert ids == prompt + tokenizer.encode(response)
