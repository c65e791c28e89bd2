"""When the policy is asked, and what is kept and shown of it; whole runs are in distributed/test_generations.py."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from megatron_bdpo.data.prompts import EvalPrompts, PromptRow
from tests.harness.jobs import own_process
from tests.harness.moments import start

PROMPTS = EvalPrompts([PromptRow("2 + 2?", {"kind": "sum"}, "line 1")], [], [], 8, "ask.jsonl")


def asked(save: Path, first: int, iterations: list[int], given_up_at: int | None = None) -> tuple[int, str, Any]:
    """How often the policy answers, what is said, and the table, of a run with these evaluations from a step on."""
    from megatron_bdpo.training.callbacks import generated_answers as answers
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.generation.decoding import PackShape
    from megatron_bdpo.training.stopping import StopRequest

    calls: list[int] = []

    def answer(*arguments: Any) -> Any:
        calls.append(iterations[len(calls)])
        found = SimpleNamespace(answers=[[1, 2, 3]], finished=[True], without_end=lambda index: [calls[-1]])
        return None if calls[-1] == given_up_at else found

    said = io.StringIO()
    with (
        process_groups(own_process()),
        contextlib.redirect_stdout(said),
        mock.patch.object(answers, "answer_greedily", answer),
        mock.patch.object(answers, "get_tokenizer", lambda: None),
        mock.patch.object(answers, "get_wandb_writer", lambda: None),
        mock.patch.object(
            answers, "PairTokenizer", lambda tokenizer: SimpleNamespace(text=lambda ids: f"it is {ids[0]}")
        ),
    ):
        callback = answers.Answers(PROMPTS, PackShape(64, 1, fixed=False), 100, str(save), StopRequest())
        callback.after_load(start(first))
        for iteration in iterations:
            callback.after_evaluation({}, iteration)
        table = callback.table()
    return len(calls), said.getvalue(), table and (table.titles, table.rows)


def rows(save: Path) -> list[tuple[int, str, str]]:
    found = map(json.loads, (save / "generations.jsonl").read_text().splitlines())
    return [(row["step"], row["answer"], row["kind"]) for row in found]


def test_answers_of_each_evaluation_are_kept_and_shown(ranks, tmp_path):
    ((_, said, table),) = ranks(1)(asked, tmp_path, 0, [0, 5])
    assert rows(tmp_path) == [(0, "it is 0", "sum"), (5, "it is 5", "sum")]
    assert "prompts, after step 5 | 1 answered, 1 to their end | 3.0 tokens each" in said
    assert table == (["prompt", "step 0", "step 5"], [["2 + 2?", "it is 0", "it is 5"]])


def test_a_run_that_goes_on_adds_to_what_is_there(ranks, tmp_path):
    ranks(1)(asked, tmp_path, 0, [0, 5, 10])
    ((_, _, table),) = ranks(1)(asked, tmp_path, 5, [20])
    assert [step for step, _, _ in rows(tmp_path)] == [0, 5, 20]
    assert table[0] == ["prompt", "step 0", "step 20"]


def test_once_after_a_step(ranks, tmp_path):
    """Megatron evaluates twice after the last one."""
    assert ranks(1)(asked, tmp_path, 0, [7, 7])[0][0] == 1


def test_answers_that_were_given_up(ranks, tmp_path):
    ((_, said, table),) = ranks(1)(asked, tmp_path, 0, [3], given_up_at=3)
    assert said.endswith("prompts, after step 3 | given up: \n") and table is None
    assert (tmp_path / "generations.jsonl").read_text() == ""
