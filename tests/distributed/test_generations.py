"""--eval-prompts beside a training run: it changes nothing there, and what it leaves survives resumes and stops."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.harness.jobs import train

HELD_OUT = ["--eval-share", "0.25", "--eval-interval", "1", "--eval-at-start"]
QUESTIONS = [f"User: What is {number} and {number}?\nAssistant:" for number in range(3)]
FLAGSHIP = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
    "--sequence-parallel --bf16"
)
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {
    "DP2, overlapped": (2, OVERLAPPED),
    "EP2": (2, "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 --moe-aux-loss-coeff 0.01"),
    "TP2 SP VPP2, bf16": (4, FLAGSHIP),
    "DP2 CP2, overlapped, bf16": (4, f"--context-parallel-size 2 --bf16 {OVERLAPPED}"),
}
JOB = {"max_pairs": 16, "pairs_per_step": 4, "train_iters": 2, "preference_loss": "dpo"}


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "ask.jsonl"
    path.write_text("".join(json.dumps({"kind": "sum", "prompt": text}) + "\n" for text in QUESTIONS))
    return ["--eval-prompts", str(path), "--eval-prompt-tokens", "6"]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_to_the_bit(ranks, tmp_path, questions, layout):
    world_size, flags = LAYOUTS[layout]
    flags = [*HELD_OUT, *flags.split()]
    without = ranks(world_size)(train, flags, pair_cache_dir=str(tmp_path / "cache"), **JOB)
    saved = ["--save", str(tmp_path / "run"), "--save-interval", "2"]
    beside = ranks(world_size)(train, [*flags, *questions, *saved], pair_cache_dir=str(tmp_path / "cache"), **JOB)
    for expected, found in zip(without, beside, strict=True):
        assert without_speed(found.steps) == without_speed(expected.steps)
        assert found.evaluations == expected.evaluations
        for (name, _, _, values), (_, _, _, expected_values) in zip(found.shards, expected.shards, strict=True):
            assert np.array_equal(values, expected_values), name
    assert [(row["step"], row["prompt"]) for row in rows_of(tmp_path / "run")] == [
        (step, text) for step in range(3) for text in QUESTIONS
    ]
    assert len(beside[-1].steps) == 2


def without_speed(steps):
    return [{name: value for name, value in step.items() if not name.startswith("throughput")} for step in steps]


def test_rows(ranks, tmp_path, questions):
    """The answers of step 0 differ from those of a policy that has been trained hard."""
    ranks(2)(train, [*HELD_OUT, *questions, "--save", str(tmp_path), "--save-interval", "2"], **(JOB | {"lr": 0.05}))
    rows = rows_of(tmp_path)
    assert all(row.keys() == {"step", "prompt", "answer", "tokens", "finished", "kind"} for row in rows)
    assert all(row["kind"] == "sum" and (row["finished"] or row["tokens"] == 6) for row in rows)
    first, last = ([row["answer"] for row in rows if row["step"] == step] for step in (0, 2))
    assert first != last


def test_resumed_run_answers_what_comes_after_its_checkpoint(ranks, tmp_path, questions):
    run = tmp_path / "run"
    save = ["--save", str(run), "--load", str(run), "--save-interval", "1"]
    flags = [*HELD_OUT, *questions, *save]
    ranks(2)(train, flags, **JOB)
    expected = rows_of(run)
    assert [row["step"] for row in expected[::3]] == [0, 1, 2]
    (run / "latest_checkpointed_iteration.txt").write_text("1")  # as if it had been killed in step 2
    text = (run / "generations.jsonl").read_text()
    (run / "generations.jsonl").write_text(text[:-20])
    ranks(2)(train, flags, **JOB)
    assert rows_of(run) == expected
    ranks(2)(train, flags, **JOB)  # of a finished run
    assert rows_of(run) == expected


def test_another_run_in_the_directory_leaves_no_answers_of_the_first(ranks, tmp_path, questions):
    save = ["--save", str(tmp_path), "--save-interval", "1"]
    ranks(1)(train, [*HELD_OUT, *questions, *save], **(JOB | {"train_iters": 1}))
    assert rows_of(tmp_path)
    ranks(1)(train, [*HELD_OUT, *save, "--overwrite"], **(JOB | {"train_iters": 1}))
    assert rows_of(tmp_path) == []


def told_to_wandb(flags: list[str]) -> list[tuple[dict[str, Any], int]]:
    """What is logged, with tables as their arguments: those of wandb 0.31's Table."""
    from megatron_bdpo.training.callbacks import generated_answers as answers

    logged: list[tuple[dict[str, Any], int]] = []
    wandb = SimpleNamespace(Table=lambda columns, data: [columns, *data], log=lambda *told: logged.append(told))
    with mock.patch.object(answers, "get_wandb_writer", lambda: wandb):
        train(flags, **JOB)
    return logged


def test_wandb_has_a_table_for_each_evaluation(ranks, questions):
    with Path(questions[1]).open("a") as file:
        file.write(json.dumps({"prompt": "User: Why?\nAssistant:", "weight": 2}) + "\n")
    logged = ranks(2)(told_to_wandb, [*HELD_OUT, *questions])
    assert logged[0] == [] and [step for _, step in logged[1]] == [0, 1, 2]
    columns, *rows = logged[1][-1][0]["generations"]
    assert columns == ["prompt", "step 0", "answer", "tokens", "finished", "kind", "weight"]
    assert [row[0] for row in rows] == [*QUESTIONS, "User: Why?\nAssistant:"]
    assert [row[5:] for row in rows] == [["sum", ""]] * 3 + [["", "2"]]
    first = logged[1][0][0]["generations"]
    assert [row[1] for row in rows] == [row[2] for row in first[1:]]


def stopped_while_answering(flags: list[str], stop_file: str) -> Any:
    """The outcome of a run that is asked to stop in its second evaluation's second pass."""
    from megatron_bdpo.training.forward import NextTokenStep

    call, passes = NextTokenStep.__call__, []

    def noticed(step: Any, *args: Any) -> Any:
        passes.append(step)
        if len(passes) == 6 + 2:
            Path(stop_file).touch()
        return call(step, *args)

    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.object(NextTokenStep, "__call__", noticed))
        outcome = train(flags, **JOB)
    return outcome.exit_code, len(passes)


def test_a_stop_while_answering_ends_the_run_with_a_checkpoint(ranks, tmp_path, questions):
    """Prompts whose answers are as long as they may be, so that passes can be counted."""
    stop_file, run = str(tmp_path / "stop"), tmp_path / "run"
    flags = [*HELD_OUT, *questions, "--stop-file", stop_file, "--save", str(run), "--save-interval", "2"]
    found = ranks(2)(stopped_while_answering, flags, stop_file)
    assert found == [(0, 8), (0, 8)]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert {row["step"] for row in rows_of(run)} == {0}
