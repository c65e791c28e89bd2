"""LD-DPO in jobs: what is scored for it, kept, and scored again where it is missing; every kind of reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.training.reference.cache import open_scores
from tests.distributed.test_bad_input import assert_refused, refusal
from tests.harness.jobs import last_stage, score, train
from tests.harness.recording import merge, train_and_record

JOB = {"max_pairs": 16, "pairs_per_step": 8, "train_iters": 2, "lr": 1e-2}
DPO = ["--preference-loss", "dpo"]
LD = [*DPO, "--ld-alpha", "0.25"]
CP2 = ["--context-parallel-size", "2"]


def told(outcomes) -> list[dict[str, float]]:
    return [
        {name: value for name, value in step.items() if not name.startswith("throughput")}
        for step in last_stage(outcomes).steps
    ]


def parts(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("part-*"))


def test_the_reference_is_scored_once_and_again_where_beginnings_are_missing(ranks, tmp_path):
    """A directory that was begun for DPO takes them in; DPO goes on with it, and finds its own bits."""
    job = JOB | {"pair_cache_dir": str(tmp_path)}
    expected = told(ranks(1)(train, DPO, **job))
    (manifest,) = tmp_path.glob("**/manifest.json")
    directory, (first,) = manifest.parent, parts(manifest.parent)
    known = open_scores(directory)
    assert np.isnan(known.beginnings).all()
    found = told(ranks(1)(train, LD, **job))
    assert len(parts(directory)) == 2 and first in parts(directory)
    scored = open_scores(directory)
    assert np.array_equal(scored.conditional, known.conditional) and np.isfinite(scored.beginnings[:16]).all()
    shorter = known.tokens.argmin(axis=1)[:16]
    of_shorter = np.take_along_axis(scored.beginnings[:16], shorter[:, None], 1)
    assert np.allclose(of_shorter, np.take_along_axis(known.conditional[:16], shorter[:, None], 1), rtol=1e-6)
    assert told(ranks(1)(train, LD, **job)) == found and told(ranks(1)(train, DPO, **job)) == expected
    assert len(parts(directory)) == 2, "nothing was scored once more"
    assert found[1]["loss"] != pytest.approx(expected[1]["loss"], rel=1e-3)


def test_scored_beginnings_are_sums_over_the_first_tokens(ranks, tmp_path):
    """Of each pair, whichever answer is longer: by the first step's own token log-probs."""
    job = JOB | {"pair_cache_dir": str(tmp_path), "pairs_per_step": 16, "train_iters": 1}
    tokens = merge(ranks(1)(train_and_record, DPO, redraw=False, **job)).steps[0].tokens
    ((directory,),) = ranks(2)(score, [*LD, *CP2], **job)[:1]
    scored = open_scores(directory)
    assert len(tokens) == 16 and any(len(chosen) != len(rejected) for chosen, rejected in tokens.values())
    for pair, sides in tokens.items():
        common = min(map(len, sides))
        expected = [side[:common].sum() for side in sides]
        assert scored.beginnings[pair] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adapters", [[], ["--lora-rank", "4"]], ids=["full", "LoRA"])
def test_a_resident_reference_finds_what_was_scored(ranks, tmp_path, adapters):
    job = JOB | {"pair_cache_dir": str(tmp_path)}
    expected = told(ranks(1)(train, [*LD, *adapters], **job))
    found = told(ranks(2)(train, [*LD, *adapters, *CP2, "--reference", "resident"], **job))
    for step, expected_step in zip(found, expected, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4, abs=1e-5)


def test_a_mix_whose_other_term_sorts_the_step(ranks, tmp_path):
    """It sorts log-probs of whole answers."""
    job = JOB | {"pair_cache_dir": str(tmp_path), "train_iters": 1}
    mixed = ["--preference-loss", "dpo=1,aot=1"]
    (expected,), (found,) = (told(ranks(1)(train, [*mixed, *more], **job)) for more in ([], LD[2:]))
    assert found["loss/aot"] == expected["loss/aot"]


def test_rows_that_bring_log_probs_have_none_of_beginnings(ranks):
    refused = ranks(1)(refusal, [*LD, "--reference", "columns"], **JOB)
    assert_refused(refused, "--reference columns has the log-probs of whole answers, and --ld-alpha compares their beg")
