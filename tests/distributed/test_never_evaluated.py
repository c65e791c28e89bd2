"""Held-out data beside ``--eval-iters 0``: nothing is asked of what is never used. What is used is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.harness.jobs import DATA, TINY_JOB, TINY_MODEL, last_stage, train
from tests.harness.ranks import RankFailure

PAIR = {"prompt": "Well?", "chosen": "Yes, of course.", "rejected": "No."}
LABELLED = {"prompt": "Well?", "completion": "Yes.", "label": True}
LONG = PAIR | {"chosen": "word " * 900}

#: Flags, rows to train on that are good for them, held-out rows, and what is said of these where they are evaluated.
CASES = {
    "one prompt, for KTO": (["--preference-loss", "kto"], [], [PAIR, PAIR | {"chosen": "Surely."}], "have one prompt"),
    "labelled answers": (["--preference-loss", "dpo"], [], [LABELLED], "compares the answers of a pair"),
    "no safety labels": (
        ["--preference-loss", "safedpo"],
        [PAIR | {"chosen_safe": True, "rejected_safe": False}] * 8,
        [PAIR],
        "the loss needs safety labels",
    ),
    "too long": (["--preference-loss", "dpo"], [], [LONG], "do not fit a pack of --seq-length"),
    "no columns": (
        ["--preference-loss", "dpo", "--reference", "columns"],
        [PAIR | {"ref_chosen_logps": -9.5, "ref_rejected_logps": -5.25}] * 8,
        [PAIR],
        "--reference columns: 1 of 9 pairs bring no log-probs",
    ),
    "malformed": (["--preference-loss", "dpo"], [], [{"prompt": 3}], "line 1"),
    "no file": (["--preference-loss", "dpo"], [], None, "there is no such file"),
}


def planned(flags: list[str], **overrides) -> tuple[str, list[str]]:
    """What this rank's job is refused with, or what it says of itself."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.build_job import build_job
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.reporting.job_description import describe_job

    arguments = Arguments.parse(flags, TINY_MODEL | TINY_JOB | overrides)
    with process_groups(arguments.settings.process):
        try:
            return "", describe_job(build_job(arguments))
        except UserError as error:
            return str(error), []


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_held_out_rows_are_refused_where_they_are_used(ranks, tmp_path, case):
    flags, rows, held_out, expected = CASES[case]
    trained = write(tmp_path / "train.jsonl", rows) if rows else str(DATA / "train.jsonl")
    file = tmp_path / "heldout.jsonl"
    path = str(file) if held_out is None else write(file, held_out)
    job = {"pair_data": [trained], "eval_pair_data": [path], "pair_cache_dir": str(tmp_path / "cache")}
    (refused, _), *_ = ranks(1)(planned, flags, **job)
    assert expected in refused
    (refused, said), *_ = ranks(1)(planned, [*flags, "--eval-iters", "0"], **job)
    assert refused == "" and any(re.search("0 held out;.* --eval-pair-data is not read, for", line) for line in said)


def test_rows_that_are_kept_apart_are_asked_nothing(ranks, tmp_path):
    """Those of --eval-share are not trained on: the split does not hang on whether it is looked at."""
    pairs = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[:20]]
    held_out = {
        "eval_share": 0.2,
        "pair_cache_dir": str(tmp_path / "cache"),
        "pair_data": [str(tmp_path / "rows.jsonl")],
    }
    write(tmp_path / "rows.jsonl", pairs)
    ((_, said),) = ranks(1)(planned, ["--preference-loss", "dpo"], **held_out)
    assert "pairs: 16 to train on, 4 held out" in said
    ((_, said),) = ranks(1)(planned, ["--preference-loss", "dpo", "--eval-iters", "0"], **held_out)
    told = "4 are neither trained on nor evaluated, for --eval-iters 0"
    assert f"pairs: 16 to train on, 0 held out; {told}" in said


@pytest.mark.parametrize("flags", [["--eval-every", "5m"], ["--eval-prompts", str(DATA / "heldout.jsonl")]])
def test_flags_of_evaluations_are_refused(ranks, flags):
    with pytest.raises(RankFailure, match=f"{flags[0]} is for evaluations, and --eval-iters 0 switches them off"):
        ranks(1)(train, [*flags, "--eval-share", "0.2", "--eval-iters", "0"])


def test_a_run_with_them(ranks, tmp_path):
    path = write(tmp_path / "heldout.jsonl", CASES["one prompt, for KTO"][2])
    flags = ["--preference-loss", "kto", "--eval-pair-data", path, "--save", str(tmp_path), "--save-interval", "2"]
    found = last_stage(ranks(2)(train, [*flags, "--eval-iters", "0"], train_iters=2))
    assert len(found.steps) == 2 and found.evaluations == []
