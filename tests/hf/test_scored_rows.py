"""Rows of answers that nobody has judged: each answer's reward is transformers' own, in every layout."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.jobs import DATA, score, train
from tests.harness.reward_models import load_model, pairs_in, rewards
from tests.harness.tiny_models import make_model
from tests.hf.test_reward_models import ALLOWED, refused_score
from tests.parity.matrix import PP2, TP2

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

Row = dict[str, Any]
LINES = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:12]]
PROMPT = LINES[0]["prompt"]
#: A few words of each.
TEXTS = [line[side] for line in LINES for side in ("chosen", "rejected")]
#: Of 2, 4, 3 and 1 answers; one twice in its row, one that says nothing.
ROWS: list[Row] = [
    {"prompt": PROMPT, "responses": TEXTS[:2], "ended": [True, False]},
    {"prompt": LINES[1]["prompt"], "responses": [TEXTS[2], TEXTS[3], TEXTS[2], TEXTS[4]], "id": 7},
    {"prompt": LINES[2]["prompt"], "responses": [TEXTS[5], " ", TEXTS[6]]},
    {"prompt": LINES[3]["prompt"], "responses": [TEXTS[7]]},
]
EMPTY = (2, 1)
JOB = {"max_pairs": None, "pairs_per_step": None, "train_iters": None, "lr": None}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    """By transformers, with a head of its own, that pads with what ends answers."""
    directory = tmp_path_factory.mktemp("model")
    original = make_model("llama tied", directory, pad_token_id=2)
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(original, num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(directory / "reward")
    return directory / "reward"


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags(reward_model: Path, directory: Path, rows: list[Row]) -> list[str]:
    """Of a job that writes ``out.jsonl``."""
    directory.mkdir(exist_ok=True)
    words = ["--objective", "reward", "--hf-model", str(reward_model), "--scored-rows", str(directory / "out.jsonl")]
    return [
        *words,
        "--pair-data",
        written(directory / "rows.jsonl", rows),
        "--pair-cache-dir",
        str(directory / "cache"),
    ]


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, ""), (2, TP2), (2, PP2), (4, ""), (1, "--no-share-prompts")],
    ids=["alone", "TP2", "PP2", "DP4", "unshared"],
)
def test_rows_have_transformers_rewards_as_scores(ranks, reward_model, tmp_path, size, layout):
    ranks(size)(score, [*flags(reward_model, tmp_path, ROWS), *layout.split()], **JOB)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{**row, "scores": None} for row in found] == [{**row, "scores": None} for row in ROWS]
    row, place = EMPTY
    assert found[row]["scores"].pop(place) is None
    scores = np.array([score for each in found for score in each["scores"]])
    expected = rewards(load_model(reward_model), pairs_in(tmp_path / "cache"))[:, 0]
    assert np.abs(scores - expected).max() <= ALLOWED * np.abs(expected).max()
    again = found[1]["scores"]
    assert again[0] == again[2] and len({*again}) == 3, "one answer has one reward"


def test_answers_are_computed_once(ranks, reward_model, tmp_path):
    """A row takes the positions of its prompt and its different answers."""
    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.data.store import PairStore

    ranks(1)(score, flags(reward_model, tmp_path, ROWS), **JOB)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    store = PairStore.open(meta.parent)
    assert len(store) == 9 and [int((store.row == number).sum()) for number in (1, 2, 3, 4)] == [2, 4, 2, 1]
    pairs = [store.pair(index) for index in range(2, 6)]
    expected = len(pairs[0].prompt) + sum(len(pairs[index].chosen) for index in (0, 1, 3))
    assert PairPool([store]).sizes(share_prompts=True)[1] == expected


def test_training_reads_what_was_written(ranks, reward_model, tmp_path):
    """By a loss of lists: all answers that have a score; the row of one answer is dropped."""
    from tests.harness.jobs import last_stage

    ranks(1)(score, flags(reward_model, tmp_path, ROWS), **JOB)
    job = {"pair_data": [str(tmp_path / "out.jsonl")], "max_pairs": None, "pairs_per_step": 3, "train_iters": 1}
    outcomes = ranks(1)(train, ["--pair-cache-dir", str(tmp_path / "cache")], preference_loss="pl_dpo", **job)
    assert last_stage(outcomes).steps[0]["loss"] > 0


@pytest.mark.parametrize(
    ("rows", "more", "expected"),
    [
        ([*ROWS, {**ROWS[0], "scores": [1, 2]}], "", "line 5: wrong type: the row has 'scores'; leave the column"),
        ([{**ROWS[0], "ranks": [1, 2]}], "", "the row has 'ranks'; leave the column out"),
        (LINES[:2], "", "--scored-rows is for rows with a column responses, and"),
        ([{"prompt": PROMPT, "responses": []}], "", "column 'responses' holds 0 answers; one is needed"),
        ([{"prompt": PROMPT, "responses": "one"}], "", "column 'responses' is str; a list"),
        ([{"prompt": PROMPT, "responses": ["", " "]}], "", "No row of the pair data can be used"),
        (ROWS, "--seq-length 24", "do not fit a pack of --seq-length 24"),
        (ROWS, "--pairs-from all", "--pairs-from all is about pairs, and --scored-rows judges each answer by itself"),
        (ROWS, "--rewards pairs.jsonl", "--rewards and --scored-rows are of different rows"),
    ],
    ids=["some judged", "ranks", "pairs", "no answers", "no list", "empty", "too long", "pairs-from", "two files"],
)
def test_what_cannot_be_judged_is_refused(ranks, reward_model, tmp_path, rows, more, expected):
    (found,) = ranks(1)(refused_score, [*flags(reward_model, tmp_path, rows), *more.split()], **JOB)
    assert expected in found and not (tmp_path / "out.jsonl").exists()


def test_rows_that_do_not_fit_may_be_left_out(ranks, reward_model, tmp_path):
    long = {"prompt": PROMPT, "responses": [" ".join(TEXTS * 3), TEXTS[0]]}
    words = [*flags(reward_model, tmp_path, [ROWS[0], long, ROWS[1]]), "--long-pairs", "drop", "--seq-length", "256"]
    ranks(2)(score, words, **JOB)
    found = [json.loads(line)["responses"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [ROWS[0]["responses"], ROWS[1]["responses"]]


def test_rows_of_several_sources_keep_their_columns(ranks, reward_model, tmp_path):
    """One source after the other; where --max-pairs ends, no part of a row is written."""
    rows = [{"answers" if name == "responses" else name: value for name, value in row.items()} for row in ROWS]
    words = [*flags(reward_model, tmp_path, rows), "--pair-columns", "responses=answers"]
    words.insert(words.index("--pair-data") + 2, written(tmp_path / "more.jsonl", rows[1::-1]))
    ranks(1)(score, words, **JOB)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{**row, "scores": None} for row in found] == [{**row, "scores": None} for row in (*rows, *rows[1::-1])]
    scores = [row["scores"] for row in found]
    assert len({*scores[0], *scores[1]}) == 5
    for again, first in zip(scores[4:], scores[1::-1], strict=True):
        assert again == pytest.approx(first, rel=ALLOWED, abs=ALLOWED)
    (tmp_path / "out.jsonl").unlink()
    ranks(1)(score, words, **JOB | {"max_pairs": 3})
    assert [json.loads(line)["answers"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [TEXTS[:2]]


@pytest.mark.parametrize(("flag", "rows"), [("--scored-rows", ROWS), ("--rewards", LINES[:4])], ids=["rows", "pairs"])
def test_rewards_that_are_not_finite_are_not_written(ranks, reward_model, tmp_path, flag, rows):
    broken = load_model(reward_model)
    with torch.no_grad():
        broken.score.weight[0, 0] = torch.inf
    broken.save_pretrained(tmp_path / "broken")
    words = [flag if word == "--scored-rows" else word for word in flags(tmp_path / "broken", tmp_path, rows)]
    (found, same) = ranks(2)(refused_score, words, **JOB)
    assert "the rewards of 8 answers are not finite:" in found and "rows.jsonl, line 1" in found and found == same
    assert not (tmp_path / "out.jsonl").exists()


def test_one_row_for_two_ranks(ranks, reward_model, tmp_path):
    """They may share its tensors, but not it."""
    words = flags(reward_model, tmp_path, ROWS[:1])
    (found, _) = ranks(2)(refused_score, words, **JOB)
    assert "1 usable groups cannot be split over 2 data-parallel ranks" in found
    ranks(2)(score, [*words, *TP2.split()], **JOB)
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["scores"]) == 2


def stopped_score(words: list[str], **overrides: Any) -> str:
    """What scoring ends with when it is asked to stop before its first call of the model."""
    import os

    from megatron_bdpo.training import reward_file
    from megatron_bdpo.training.stopping import StopRequested

    scorer = reward_file.make_scorer

    def told_to_stop(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return scorer(*args)

    reward_file.make_scorer = told_to_stop
    try:
        score(words, **overrides)
    except StopRequested as stopped:
        return str(stopped.reason)
    finally:
        reward_file.make_scorer = scorer
    return "not stopped"


def test_a_stop_leaves_no_file_and_the_same_command_writes_it(ranks, reward_model, tmp_path):
    words = [*flags(reward_model, tmp_path, ROWS), "--exit-signal-handler"]
    (reason,) = ranks(1)(stopped_score, words, **JOB)
    assert "SIGTERM" in reason and not list(tmp_path.glob("out.jsonl*"))
    ranks(1)(score, words, **JOB)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(ROWS)
