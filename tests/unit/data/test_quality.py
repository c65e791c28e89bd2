"""Quality of pairs: copies, exchanged labels, leaks and near-duplicates are counted exactly on pairs made for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.quality import DataQuality, leak
from megatron_bdpo.data.row_reader import FormatSettings
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.display import plain

Row = tuple[str, str, str]

#: Prompt, chosen, rejected, of which a number is a token.
ROWS: list[Row] = [
    ("1 2 3", " 4 5", " 6"),  # line 1
    ("7 8", " 9", " 10 11"),
    ("1 2 3", " 4 5", " 6"),  # a copy of line 1
    ("7 8", " 10 11", " 9"),  # line 2 the other way round
    ("1 2 3", " 6", " 12"),  # what lines 1 and 3 reject is chosen here
    ("20 21", " 9", " 10 11"),  # the answers of line 2 after another prompt: nothing
    ("1 2", " 3 4 5", " 6"),  # the tokens of line 1, cut elsewhere: nothing
    ("1 2 3", " 4 5", " 6"),  # a copy again
]


@pytest.fixture(scope="session")
def tokenizer(megatron_tokenizer: Callable[..., Any]) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=5000))


@pytest.fixture
def make_rows(tmp_path: Path, tokenizer: PairTokenizer) -> Callable[..., PairStore]:
    """A store of rows."""

    def store(rows: list[dict[str, Any]], name: str = "train") -> PairStore:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_pairs(PairDataSettings((SourceSpec(str(path)),), tmp_path / "cache"), tokenizer)

    return store


@pytest.fixture
def make(make_rows: Callable[..., PairStore]) -> Callable[..., PairStore]:
    """A store of pairs."""

    def store(rows: list[Row], name: str = "train") -> PairStore:
        return make_rows([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows], name)

    return store


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [str(token) for token in rng.integers(1, 4990, count)]


def test_copies_flips_and_contradictions(make, tmp_path):
    found = DataQuality.of(make(ROWS))
    assert (found.pairs, found.prompts) == (8, 4)
    assert (found.copies.count, found.flips.count, found.contradictions.count) == (2, 2, 4)
    name = tmp_path / "train.jsonl"
    assert found.copies.example == f"{name}, line 3; see {name}, line 1"
    assert found.flips.example == f"{name}, line 2; see {name}, line 4"
    assert found.contradictions.example == f"{name}, line 1; see {name}, line 5"
    assert found.leaked_pairs is found.leaked_prompts is found.leaked_near is None


def test_a_ranking_does_not_contradict_itself(tmp_path, tokenizer):
    """Its middle answers are chosen in one pair and rejected in another; another row may say otherwise."""
    path = tmp_path / "ranked.jsonl"
    ranked = {"prompt": "1 2", "responses": [" 3", " 4", " 5"], "scores": [3, 2, 1]}
    other = {"prompt": "1 2", "responses": [" 5", " 6"], "scores": [2, 1]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (ranked, ranked | {"prompt": "7"}, other)))
    sources = (SourceSpec(str(path)),)
    settings = PairDataSettings(sources, tmp_path / "cache", form=FormatSettings(pairs_from="all"))
    found = DataQuality.of(prepare_pairs(settings, tokenizer))
    assert (found.pairs, found.contradictions.count) == (7, 3), "5 is chosen in line 3, rejected twice in line 1"
    assert found.contradictions.example == f"{path}, line 1; see {path}, line 3"


def test_leaks(make, tmp_path):
    held_out = [
        ("30 31", " 9", " 8"),
        ("7 8", " 9", " 33"),  # the prompt alone
        ("7 8", " 10 11", " 9"),  # the pair of line 4
        ("1 2 3 4", " 5", " 6"),  # the tokens of line 1, cut elsewhere
    ]
    train, other = make(ROWS), make(held_out, "held_out")
    found = DataQuality.of(train, other)
    assert found.leaked_prompts is not None and found.leaked_pairs is not None
    assert (found.leaked_prompts.count, found.leaked_prompts.of, found.leaked_pairs.count) == (2, 4, 1)
    assert found.leaked_prompts.example == f"{tmp_path / 'held_out.jsonl'}, line 2; see {train.describe(1)}"
    assert found.leaked_pairs.example == f"{other.describe(2)}; see {train.describe(3)}"
    assert leak(train, other) == found.leaked_prompts
    assert leak(train, other, most_pairs=1).count == 0, "of one pair of each"
    assert leak(other, make([("40", " 1", " 2")], "none")).count == 0


def of_prompts(prompts: list[list[str]]) -> list[Row]:
    return [(" ".join(prompt), " 1 2", " 3") for prompt in prompts]


def test_near_duplicates(make):
    """One token of 60 changed leaves 55 of 67 shingles, half of them changed 30; an unrelated prompt none."""
    rng = np.random.default_rng(1)
    prompts = [words(rng, 60) for _ in range(150)]
    near = [*prompts[40]]
    near[30] = "4999"
    far = [*prompts[50][:30], *words(rng, 30)]
    other_order = [str(token) for token in rng.permutation(prompts[60])]
    train = make(of_prompts([*prompts, near, far, other_order, words(rng, 3)]))
    found = DataQuality.of(train)
    assert (found.near.count, found.near.of) == (1, 154)
    assert found.near.example == f"{train.describe(150)}; see {train.describe(40)}"

    shortened = prompts[7][:-2]
    untrained = words(rng, 60)
    of_each_other = [untrained, untrained[:-1]]
    other = make(of_prompts([*of_each_other, shortened, prompts[8], prompts[9][:20]]), "held_out")
    both = DataQuality.of(train, other)
    assert both.leaked_near is not None and both.leaked_prompts is not None
    assert both.leaked_prompts.count == 1, "prompts[8], which is not near but the same"
    assert (both.leaked_near.count, both.leaked_near.of) == (1, 4)
    assert both.leaked_near.example == f"{other.describe(2)}; see {train.describe(7)}"
    assert both.near == found.near


def test_a_template_makes_no_near_duplicates(make):
    """Long words of a template around short prompts of their own."""
    rng = np.random.default_rng(2)
    head, tail = words(rng, 100), words(rng, 20)
    train = make(of_prompts([[*head, *tail], *([*head, *words(rng, 8), *tail] for _ in range(120))]))
    assert DataQuality.of(train).near.count == 0
    few = make(of_prompts([[*head, *words(rng, 8), *tail] for _ in range(10)]), "few")
    assert DataQuality.of(few).near.count == 9, "of a few prompts nobody knows what the template is"


def test_no_more_prompts_than_allowed_are_compared(make):
    rng = np.random.default_rng(3)
    prompts = [words(rng, 30) for _ in range(50)]
    train, other = make(of_prompts(prompts + prompts)), make(of_prompts([words(rng, 30) for _ in range(9)]), "held_out")
    found = DataQuality.of(train, other, most_prompts=16)
    assert found.leaked_near is not None
    assert (found.near.of, found.leaked_near.of) == (8, 8)
    assert DataQuality.of(train, other).near.of == 50


@pytest.mark.parametrize("tokens", [1, 4, 5, 6])
def test_short_prompts(make, tokens):
    """Shorter than a shingle, they are near to none but themselves."""
    rng = np.random.default_rng(tokens)
    found = DataQuality.of(make(of_prompts([words(rng, tokens) for _ in range(40)])))
    assert found.near.count == 0


def test_length_bias(make):
    """Tokens of chosen and rejected, ends of text included: 3 2, 2 3, 3 2, 3 2, 2 2."""
    answers = [("1 1", "2"), ("1", "2 2"), ("1 1", "2"), ("1 1", "2"), ("1", "2")]
    bias = DataQuality.of(make([(str(i), f" {w}", f" {other}") for i, (w, other) in enumerate(answers, 10)])).length
    assert (bias.longer, bias.shorter, bias.rule) == pytest.approx((0.6, 0.2, 0.7))
    assert bias.mean_difference == pytest.approx(0.4)
    lengths, chosen = np.array([3, 2, 3, 3, 2, 2, 3, 2, 2, 2]), np.array([1] * 5 + [0] * 5)
    assert bias.correlation == pytest.approx(np.corrcoef(lengths, chosen)[0, 1])
    assert sum(bias.pairs) == 5 and len(bias.edges) == len(bias.pairs) + 1


def test_what_is_shown(make):
    found = DataQuality.of(make(ROWS), make(ROWS[:1], "held_out"))
    text = plain(found.blocks())
    assert "copies of an earlier pair" in text and "25.00%" in text and "line 3; see" in text
    assert "held-out pairs that are trained on" in text and "100.00%" in text
    assert json.loads(json.dumps(found.to_json()))["flips"]["count"] == 2


#: The same of labelled answers: prompt, answer, label.
LABELLED = [
    ("1 2 3", " 4 5", True),  # line 1
    ("7 8", " 9", False),
    ("1 2 3", " 4 5", True),  # a copy of line 1
    ("7 8", " 9", True),  # line 2 with the other label
    ("1 2 3", " 6", False),
    ("1 2 3", " 10 11 12", False),
    ("1 2", " 3 4 5", False),  # the tokens of line 1, cut elsewhere: nothing
]


def labelled(rows: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    return [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows]


def test_labelled_answers(make_rows, tmp_path):
    """A copy has the same label; a copy with the other one is a contradiction; equal prompts alone are nothing."""
    train, other = make_rows(labelled(LABELLED)), make_rows(labelled([LABELLED[4], ("7 8", " 9 9", True)]), "other")
    found = DataQuality.of(train, other)
    assert (found.pairs, found.labelled, found.prompts, found.length) == (7, 7, 3, None)
    assert (found.copies.count, found.flips.count, found.contradictions.count) == (1, 2, 0)
    name = tmp_path / "train.jsonl"
    assert found.copies.example == f"{name}, line 3; see {name}, line 1"
    assert found.flips.example == f"{name}, line 2; see {name}, line 4"
    assert found.leaked_pairs is not None and found.leaked_prompts is not None
    assert (found.leaked_pairs.count, found.leaked_prompts.count) == (1, 2)
    bias = found.labels
    assert bias is not None and (bias.desirable, bias.undesirable) == (3, 4)
    assert (bias.mean_desirable, bias.mean_undesirable) == pytest.approx((8 / 3, 3))
    tokens, labels = [3, 2, 3, 2, 2, 4, 4], [1, 0, 1, 1, 0, 0, 0]
    assert bias.correlation == pytest.approx(np.corrcoef(tokens, labels)[0, 1])
    text = plain(found.blocks())
    assert "quality of 7 labelled answers" in text and "answers labelled both ways" in text and "pair" not in text
    assert "3 desirable (42.9%), 4 undesirable" in text
    json.dumps(found.to_json())


def test_labelled_answers_beside_pairs(make_rows):
    """An answer that is desirable here and rejected there is a contradiction; chosen there, it is none."""
    rows = labelled([("1", " 2", True), ("1", " 3", False), ("5", " 6", False)])
    pairs = [{"prompt": "1", "chosen": " 4", "rejected": " 2"}, {"prompt": "1", "chosen": " 7", "rejected": " 3"}]
    found = DataQuality.of(make_rows([*rows, *pairs]))
    assert (found.pairs, found.labelled, found.copies.count, found.flips.count) == (5, 3, 0, 0)
    assert found.contradictions.count == 2, "the answer 2, in two rows"
    assert found.length is not None and found.length.compared == 2
    assert "quality of 5 pairs and labelled answers" in plain(found.blocks())


def test_labels_of_one_kind(make_rows):
    """Nothing to compare is no bias, and no warning of NumPy's."""
    bias = DataQuality.of(make_rows(labelled([("1", " 2", True), ("2", " 3 4", True)]))).labels
    assert bias is not None and (bias.correlation, bias.mean_undesirable) == (0, 0)
