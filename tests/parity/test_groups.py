"""Rows with any number of answers: computed once, they take the steps of their pairs, in every layout."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.jobs import DATA
from tests.harness.parity import beyond, deviations
from tests.harness.ranks import RankFailure
from tests.parity.matrix import ALLOWED, CP2, MODELS, PP2, TP2_SP, VPP2

#: Scores of each row's answers; equal ones are not compared.
SCORES = [(9, 1), (5, 3, 1), (4, 8, 4, 2), (1, 2, 3, 4, 5), (7, 7, 2), (2, 6), (3, 2, 1, 0), (5, 1, 5)]
PAIRS = sum(a != b for scores in SCORES for a, b in itertools.combinations(scores, 2))

#: Pairs whose answers are both unsafe, which SafeDPO leaves out; the others of their groups stay.
UNSAFE_BOTH = 3

#: Each of the three steps has all rows: which make up a step depends on their lengths.
JOB = MODELS["dense"].overrides | {"max_pairs": None, "train_iters": 3, "lr": 1e-2}


def rows() -> list[dict[str, Any]]:
    """Prompts of the example, each with its own two answers and with those of other rows."""
    lines = (DATA / "train.jsonl").read_text("utf-8").splitlines()[:16]
    examples = [json.loads(line) for line in lines]
    answers = [each[name] for each in examples for name in ("chosen", "rejected")]
    return [
        {
            "prompt": examples[index]["prompt"],
            "responses": answers[2 * index : 2 * index + len(scores)],
            "scores": scores,
            "responses_safe": [place % 2 == 0 for place in range(len(scores))],
        }
        for index, scores in enumerate(SCORES)
    ]


def pairs_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Its pairs as rows, in the order in which they are made of it: the best answer first, then the next."""
    order = sorted(range(len(row["scores"])), key=lambda place: -row["scores"][place])
    compared = [(a, b) for a, b in itertools.combinations(order, 2) if row["scores"][a] != row["scores"][b]]
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["responses"][better],
            "rejected": row["responses"][worse],
            "chosen_safe": row["responses_safe"][better],
            "rejected_safe": row["responses_safe"][worse],
        }
        for better, worse in compared
    ]


def job(path: Path, made: list[dict[str, Any]], **overrides: Any) -> tuple[list[str], dict[str, Any]]:
    """Flags and overrides of a job on these rows, all of them in every step."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return [], JOB | {"pair_data": (str(path),), "pairs_per_step": len(made)} | overrides


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return job(tmp_path_factory.mktemp("groups") / "groups.jsonl", rows(), pairs_from="all")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = [pair for row in rows() for pair in pairs_of(row)]
    assert len(made) == PAIRS
    return job(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", made)


@pytest.mark.parametrize(
    "flags",
    [
        "--preference-loss bdpo",
        "--preference-loss dpo --reference resident",
        "--preference-loss bdpo --reference resident --no-share-prompts",
        "--preference-loss simpo --no-pack-pairs",
        "--preference-loss dpo --ld-alpha 0.3",
        "--preference-loss dpo --ld-alpha 0.3 --reference resident --no-share-prompts",
        "--preference-loss safedpo",
    ],
)
def test_a_group_is_its_pairs(one_process, groups, pairs, flags):
    """With the mean over pairs: losses, log-probs and gradients, although each answer is computed once."""
    found = one_process([*flags.split(), "--mean-over", "pairs"], groups[1])
    kept = len(found.steps[0].sequences[0])
    assert kept == PAIRS - UNSAFE_BOTH if "safedpo" in flags else kept == PAIRS
    expected = one_process(flags.split(), pairs[1] | {"pairs_per_step": kept})
    assert beyond(deviations(found, expected), ALLOWED) == {}


LAYOUTS = {
    "DP2": (2, ""),
    "CP2 DP2": (4, CP2),
    "TP2 SP PP2": (4, f"{TP2_SP} {PP2}"),
    "PP2 VPP2 CP2": (4, f"{VPP2} {CP2}"),
}


@pytest.mark.parametrize("over", ["groups", "pairs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_in_a_layout(run, one_process, groups, layout, over):
    ranks, split = LAYOUTS[layout]
    flags = ["--preference-loss", "bdpo", "--mean-over", over]
    found = run(ranks, [*split.split(), *flags], groups[1])
    assert beyond(deviations(found, one_process(flags, groups[1])), ALLOWED) == {}


def test_the_mean_over_groups(one_process, groups, tmp_path):
    """Its gradient is the mean of the groups' own, whatever the number of their pairs."""
    flags = ["--preference-loss", "bdpo"]
    found = one_process(flags, groups[1]).steps[0]
    alone = []
    for index, row in enumerate(rows()):
        _, overrides = job(tmp_path / f"{index}.jsonl", pairs_of(row), train_iters=1)
        alone.append(one_process(flags, overrides).steps[0])
    for name in ("loss", "rewards/accuracies", "comprehension/imbalance", "logps/chosen"):
        expected = np.mean([each.metrics[name] for each in alone])
        assert found.metrics[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    for name, gradient in found.gradients.items():
        expected = np.mean([each.gradients[name] for each in alone], axis=0)
        assert np.abs(gradient - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-9, name
    over_pairs = one_process([*flags, "--mean-over", "pairs"], groups[1]).steps[0]
    assert over_pairs.metrics["logps/chosen"] != pytest.approx(found.metrics["logps/chosen"], rel=1e-3), "not the same"


LISTS = [
    "pl_dpo",
    "infonca",
    "nca",
    "lipo_lambda",
    "bdpo_list",
    "bdpo_list --bdpo-list-form all-pairs",
    "tpo",
    "tpo --tpo-length-normalized --tpo-gamma 0.5 --beta 2",
]


@pytest.mark.parametrize("loss", LISTS)
@pytest.mark.parametrize("layout", ["CP2 DP2", "TP2 SP PP2"])
def test_losses_of_lists_in_a_layout(run, one_process, groups, loss, layout):
    """Without a word on pairs, all answers of a row take part."""
    overrides = {name: value for name, value in groups[1].items() if name != "pairs_from"}
    ranks, split = LAYOUTS[layout]
    flags = ["--preference-loss", *loss.split()]
    found = run(ranks, [*split.split(), *flags], overrides)
    expected = one_process(flags, overrides)
    assert len(expected.steps[0].sequences[0]) == PAIRS
    assert beyond(deviations(found, expected), ALLOWED) == {}


@pytest.mark.parametrize(
    ("of_lists", "of_pairs"), [("pl_dpo", "dpo"), ("bdpo_list", "bdpo"), ("tpo --beta 0.1", "cpo")]
)
def test_a_list_of_two_is_a_pair(one_process, pairs, of_lists, of_pairs):
    """Rows of pairs give no scores: the chosen answer has the higher one."""
    found = one_process(["--preference-loss", *of_lists.split()], pairs[1])
    expected = one_process(["--preference-loss", of_pairs], pairs[1])
    assert beyond(deviations(found, expected), ALLOWED) == {}
    for name in expected.steps[2].metrics.keys() - {"loss"}:
        if not name.startswith("throughput"):
            value = expected.steps[2].metrics[name]
            assert found.steps[2].metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_all_pairs_of_a_list(one_process, groups):
    """B-DPO's form of all pairs is B-DPO on the pairs, if every group counts alike."""
    found = one_process(["--preference-loss", "bdpo_list", "--bdpo-list-form", "all-pairs"], groups[1])
    expected = one_process(["--preference-loss", "bdpo"], groups[1])
    assert beyond(deviations(found, expected), ALLOWED) == {}


def test_lists_with_a_resident_reference(one_process, groups):
    """It scores every answer of a step just before the policy does, and finds what was scored ahead."""
    flags = ["--preference-loss", "bdpo_list"]
    found = one_process([*flags, "--reference", "resident"], groups[1])
    assert beyond(deviations(found, one_process(flags, groups[1])), ALLOWED) == {}


def test_the_temperature_follows_from_all_pairs_of_the_groups(one_process, groups):
    """auto for a list is auto for its pairs: the first step's weights are those of the same temperature."""
    found = {}
    for form in (["bdpo_list", "--bdpo-list-form", "all-pairs"], ["bdpo"]):
        flags = ["--preference-loss", *form, "--bdpo-temperature", "auto"]
        found[form[0]] = one_process(flags, groups[1] | {"train_iters": 1}).steps[0].metrics
    for name in ("weights/chosen", "weights/rejected", "scale"):
        assert found["bdpo_list"][name] == pytest.approx(found["bdpo"][name], rel=1e-5), name
    assert found["bdpo"]["scale"] < 0.999, "auto balances something"


def test_a_list_has_no_mean_over_pairs(run, groups):
    flags = ["--preference-loss", "pl_dpo", "--mean-over", "pairs"]
    with pytest.raises(RankFailure, match="--mean-over pairs: --preference-loss pl_dpo is a loss of groups"):
        run(1, flags, groups[1])
