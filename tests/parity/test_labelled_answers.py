"""Losses of labelled answers: rows of one answer and of two, in every layout, with every kind of reference."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.losses import registry
from megatron_bdpo.training.reference.cache import open_scores
from tests.harness.jobs import DATA
from tests.harness.parity import beyond, deviations
from tests.harness.ranks import RankFailure
from tests.parity.matrix import ALLOWED, CP2, PP2, TP2_SP, VPP2
from tests.parity.test_groups import job

LOSSES = [spec.name for spec in registry.all_specs() if spec.takes == "answers"]
LAYOUTS = {
    "DP2": (2, ""),
    "CP2 DP2": (4, CP2),
    "TP2 SP PP2": (4, f"{TP2_SP} {PP2}"),
    "PP2 VPP2 CP2": (4, f"{VPP2} {CP2}"),
}


def rows() -> list[dict[str, Any]]:
    """Of the example's pairs, the first as they are, of the others one answer each."""
    lines = (DATA / "train.jsonl").read_text("utf-8").splitlines()[:12]
    pairs = [{name: json.loads(line)[name] for name in ("prompt", "chosen", "rejected")} for line in lines]
    return pairs[:3] + [
        {"prompt": pair["prompt"], "completion": pair["chosen" if place % 3 else "rejected"], "label": place % 3 > 0}
        for place, pair in enumerate(pairs[3:])
    ]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> dict[str, Any]:
    """Overrides of a job each of whose three steps has all rows."""
    return job(tmp_path_factory.mktemp("labelled") / "rows.jsonl", rows())[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_in_a_layout(run, one_process, labelled, loss, layout):
    ranks, split = LAYOUTS[layout]
    flags = ["--preference-loss", loss]
    found = run(ranks, [*split.split(), *flags], labelled)
    assert beyond(deviations(found, one_process(flags, labelled)), ALLOWED) == {}


PACKED = {
    "resident": "--reference resident",
    "unshared": "--no-share-prompts",
    "alone": "--no-pack-pairs",
    "overlapped": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}


@pytest.mark.parametrize("flags", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("loss", LOSSES)
def test_however_it_is_packed(run, one_process, labelled, loss, flags):
    found = run(2, ["--preference-loss", loss, *flags.split()], labelled)
    assert beyond(deviations(found, one_process(["--preference-loss", loss], labelled)), ALLOWED) == {}


def test_what_the_step_has_found_moves_its_losses(one_process, labelled):
    """Else the tests above would compare nothing of it: it is 0 at the first step and not later."""
    for loss, name in {"kto": "kl", "bco": "delta"}.items():
        shifts = [step.metrics[name] for step in one_process(["--preference-loss", loss], labelled).steps]
        assert shifts[0] == pytest.approx(0, abs=1e-5) and abs(shifts[2]) > 1e-3, (loss, shifts)


def test_adapters_are_the_policys_alone(one_process, labelled):
    """Also where the step is looked at: else it would find nothing."""
    flags = ["--preference-loss", "bco", "--lora-rank", "2"]
    resident, known = (one_process([*flags, "--reference", each], labelled) for each in ("resident", "precomputed"))
    assert beyond(deviations(resident, known), ALLOWED) == {}
    assert abs(known.steps[2].metrics["delta"]) > 1e-4


def test_a_pair_is_two_labelled_answers(one_process, tmp_path):
    """Rows of pairs, and their answers as rows of their own: the same steps, where every row has the same weight."""
    pairs = rows()[:3] + [{**row, "prompt": row["prompt"] + " So?"} for row in rows()[:3]]
    answers = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    flags = ["--preference-loss", "bco"]  # whose shift hangs on no prompt but an answer's own
    of_pairs = one_process(flags, job(tmp_path / "pairs.jsonl", pairs)[1])
    of_answers = one_process(flags, job(tmp_path / "answers.jsonl", answers)[1])
    for a, b in zip(of_pairs.steps, of_answers.steps, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
            assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-4, abs=1e-5), name
        for name, gradient in a.gradients.items():
            assert np.abs(gradient - b.gradients[name]).max() <= 1e-4 * np.abs(gradient).max() + 1e-8, name


def test_steps_in_which_all_answers_have_one_label(one_process, tmp_path):
    made = [{**row, "label": True} for row in rows()[3:]]
    flags = ["--preference-loss", "kto", "--log-entropy"]
    metrics = one_process(flags, job(tmp_path / "rows.jsonl", made)[1]).steps[2].metrics
    assert metrics.keys().isdisjoint({"rewards/rejected", "rewards/margins", "entropy/rejected"})
    assert np.isfinite(metrics["rewards/chosen"]) and metrics["pairs/chosen"] == 1


def rows_with_a_long_prompt(repeats: int) -> list[dict[str, Any]]:
    """One prompt is so long that it goes with its own answer, and not with every other."""
    made = rows()[3:]
    made[4] |= {"prompt": "again and " * repeats + made[4]["prompt"], "completion": "Yes."}
    return made


@pytest.mark.parametrize("flags", ["", "--reference resident"], ids=["known", "resident"])
def test_answers_whose_other_prompt_does_not_fit_have_no_part_in_the_estimate(one_process, tmp_path, flags):
    """The row after the one with the long prompt has none; and none of the others is missing."""
    kto = ["--preference-loss", "kto", "--seq-length", "344"]
    data = job(tmp_path / "rows.jsonl", rows_with_a_long_prompt(120))[1]
    cache = [] if flags else ["--reference-cache", str(tmp_path / "scores")]
    steps = one_process([*kto, *flags.split(), *cache], data).steps
    assert np.isfinite([step.metrics["loss"] for step in steps]).all() and steps[2].metrics["kl"] > 1e-3
    if cache:
        has_none = np.isnan(open_scores(tmp_path / "scores" / "train").mismatched).any(axis=1)
        assert has_none.tolist() == [place == 5 for place in range(9)]


def test_stages_exchange_packs_that_hold_the_longest_answer_after_another_prompt(run, one_process, tmp_path):
    """It is longer than any row, and than the packs in which a CPU scores."""
    flags = ["--preference-loss", "kto", "--seq-length", "600"]
    data = job(tmp_path / "rows.jsonl", rows_with_a_long_prompt(200))[1]
    found = run(2, [*PP2.split(), *flags], data)
    assert beyond(deviations(found, one_process(flags, data)), ALLOWED) == {}


def test_one_prompt_alone_has_no_mismatched_answers(run, tmp_path):
    made = [{**row, "prompt": "Well?"} for row in rows()[3:]]
    with pytest.raises(RankFailure, match=r"all rows of .*rows\.jsonl have one prompt"):
        run(1, ["--preference-loss", "kto"], job(tmp_path / "rows.jsonl", made)[1])


def test_losses_of_pairs_refuse_labelled_answers(run, labelled):
    with pytest.raises(RankFailure, match=r"rows\.jsonl, line 4"):
        run(1, ["--preference-loss", "dpo"], labelled)
