"""Scores on disk and the jobs that make and use them: layouts, partial use, damage, other settings."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.training.reference.cache import open_scores
from tests.harness.jobs import DATA, last_stage, score, scores_in, train
from tests.harness.parity import assert_same_steps

TINY = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]


def stamps(directory: Path) -> dict[str, int]:
    """When each file below a directory was written."""
    return {str(path): path.stat().st_mtime_ns for path in directory.glob("reference*/**/*") if path.is_file()}


# Scoring as a job of its own


@pytest.fixture(scope="module")
def scored(ranks, tmp_path_factory) -> Path:
    """The cache of a job on two tensor-parallel ranks that has only scored."""
    cache = tmp_path_factory.mktemp("scored")
    (directory,) = ranks(2)(score, [*TP2], pair_cache_dir=str(cache))[0]
    assert directory == next(cache.glob("reference-*/*"))
    return cache


@pytest.fixture(scope="module")
def expected_run(ranks, tmp_path_factory):
    """An epoch that scores for itself, and its scores."""
    cache = tmp_path_factory.mktemp("trained")
    (outcome,) = ranks(1)(train, [], pair_cache_dir=str(cache), train_iters=6)
    return outcome, scores_in(cache)


def test_the_scores_are_those_that_a_training_makes(scored, expected_run):
    """Two ranks against one: sums of some hundred terms in another order."""
    found, (_, expected) = scores_in(scored), expected_run
    for kind in ("conditional", "unconditional"):
        assert getattr(found, kind) == pytest.approx(getattr(expected, kind), rel=1e-6), kind
    for name in ("tokens", "source", "row"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert (found.row == np.arange(1, 49)).all() and (found.tokens > 0).all()


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, []),
        (2, PP2),
        (4, [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]),
        (2, ["--context-parallel-size", "2"]),
    ],
    ids=["one process", "PP2", "VPP DP2", "CP2"],
)
def test_trainings_in_other_layouts_use_the_scores(ranks, scored, expected_run, world_size, flags):
    before = stamps(scored)
    outcomes = ranks(world_size)(train, flags, pair_cache_dir=str(scored), train_iters=6)
    assert_same_steps(last_stage(outcomes).steps, expected_run[0].steps)
    assert stamps(scored) == before, "something was scored or written"


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (4, [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]),
        (4, [*TP2, *PP2, "--sequence-parallel"]),
        (2, ["--context-parallel-size", "2"]),
        (2, []),
    ],
    ids=["VPP DP2", "TP2 PP2 SP", "CP2", "DP2"],
)
def test_every_layout_gives_the_same_scores(ranks, tmp_path, expected_run, world_size, flags):
    ranks(world_size)(score, [*flags], pair_cache_dir=str(tmp_path))
    found, (_, expected) = scores_in(tmp_path), expected_run
    for kind in ("conditional", "unconditional"):
        assert getattr(found, kind) == pytest.approx(getattr(expected, kind), rel=1e-6), kind


def test_experts_are_scored_in_parallel(ranks, tmp_path):
    experts = ["--num-experts", "4", "--moe-token-dispatcher-type", "alltoall"]
    ranks(1)(score, experts, pair_cache_dir=str(tmp_path / "one"))
    ranks(2)(score, [*experts, "--expert-model-parallel-size", "2"], pair_cache_dir=str(tmp_path / "two"))
    expected, found = scores_in(tmp_path / "one"), scores_in(tmp_path / "two")
    assert found.conditional == pytest.approx(expected.conditional, rel=1e-6)


def test_half_precision_scores_serve_the_training(ranks, tmp_path):
    ranks(1)(score, ["--bf16"], pair_cache_dir=str(tmp_path))
    before = stamps(tmp_path)
    (outcome,) = ranks(1)(train, ["--bf16"], pair_cache_dir=str(tmp_path))
    assert stamps(tmp_path) == before
    assert outcome.steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-2)  # bf16


def test_what_only_training_needs_may_be_left_out(ranks, tmp_path):
    nothing = {"pairs_per_step": None, "train_iters": None, "lr": None}
    ranks(1)(score, [], pair_cache_dir=str(tmp_path), **nothing)
    (job,) = scores_in(tmp_path).manifest["jobs"]
    assert job["pairs"] == 48 and job["groups"] == 96 and job["seconds"] > 0 and "torch" in job["versions"]


def program(*flags: str) -> tuple[int, str, str]:
    """On a rank: exit code, output and errors of ``megatron-bdpo score``."""
    from megatron_bdpo.cli.main import main

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["score", *flags])
    return code, output.getvalue(), errors.getvalue()


def test_the_program(ranks, tmp_path):
    """Flags of Megatron's, other than the program's own sub-commands have; held-out pairs too."""
    model = [
        "--num-layers",
        "2",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "4",
        "--seq-length",
        "512",
        "--max-pairs",
        "16",
    ]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(DATA / "tokenizer.model")]
    data = ["--pair-data", str(DATA / "train.jsonl"), "--eval-pair-data", str(DATA / "heldout.jsonl")]
    places = ["--pair-cache-dir", str(tmp_path / "cache"), "--reference-cache", str(tmp_path / "scores")]
    ((code, output, errors),) = ranks(1)(program, *model, *tokenizer, *data, *places)
    assert code == 0, errors
    assert "pairs/s" in output and "tokens/s" in output and "comprehension of 16 training pairs" in output
    assert len(open_scores(tmp_path / "scores" / "train")) == 16
    assert np.isfinite(open_scores(tmp_path / "scores" / "heldout").unconditional).all()
    for flag, value, reason in (
        ("--preference-loss", "simpo", "reads no reference: there is nothing to score"),
        ("--reference", "resident", "one that is resident or in columns has none"),
    ):
        ((code, _, errors),) = ranks(1)(program, *model, *tokenizer, *data, *places, flag, value)
        assert code == 2 and reason in errors, errors


def test_scores_of_a_checkpoint(ranks, tmp_path):
    """The weights that a training run starts from, whether Megatron's trainer loads them or the scoring job."""
    start, cache = tmp_path / "start", tmp_path / "cache"
    ranks(1)(train, ["--train-iters", "1", "--save", str(start), "--save-interval", "1"])
    flags = ["--pretrained-checkpoint", str(start)]
    ranks(2)(score, [*flags, *PP2], pair_cache_dir=str(cache))
    before = stamps(cache)
    ranks(1)(train, flags, pair_cache_dir=str(cache))
    assert stamps(cache) == before


def test_a_resumed_run_is_scored_with_its_original_reference(ranks, tmp_path):
    """Scores that were lost come back by a scoring job with the flags of the resumed training."""
    start, run = tmp_path / "start", tmp_path / "run"
    ranks(1)(train, ["--train-iters", "1", "--save", str(start), "--save-interval", "1"])
    flags = ["--pretrained-checkpoint", str(start), "--load", str(run), "--save", str(run), "--save-interval", "2"]
    ranks(1)(train, [*flags, "--exit-interval", "2"])
    expected = scores_in(run / "cache")
    (lost,) = (run / "cache").glob("reference-*")
    shutil.rmtree(lost)
    ranks(2)(score, [*flags, *TP2])
    assert [path.name for path in (run / "cache").glob("reference-*")] == [lost.name]
    pairs = known(expected)
    assert scores_in(run / "cache").conditional[pairs] == pytest.approx(expected.conditional[pairs], rel=1e-6)


# Partial use


def known(found) -> np.ndarray:
    """The pairs that have both kinds of scores."""
    return np.flatnonzero(np.isfinite(found.conditional).all(axis=1) & np.isfinite(found.unconditional).all(axis=1))


@pytest.mark.parametrize("layout", [[], TP2, PP2, ["--no-pack-pairs"]], ids=["DP", "TP2", "PP2", "singly"])
def test_what_the_planned_steps_use_is_scored_and_a_longer_run_adds_to_it(ranks, tmp_path, layout):
    """2 steps of 8 of 360 pairs, and the 40 that are held out; then 4 steps."""
    job = {"pair_cache_dir": str(tmp_path), "max_pairs": None}
    flags = [*layout, "--eval-share", "0.101", "--eval-interval", "1"]
    ranks(2)(train, flags, train_iters=2, **job)
    first = scores_in(tmp_path)
    assert len(first) == 396 and len(known(first)) == 2 * 8 + 40
    assert first.manifest["complete"]["scored"] == {"conditional": 56, "unconditional": 56}
    before = stamps(tmp_path)
    ranks(2)(train, flags, train_iters=2, **job)
    assert stamps(tmp_path) == before
    ranks(2)(train, flags, train_iters=4, **job)
    second = scores_in(tmp_path)
    assert len(known(second)) == 4 * 8 + 40
    assert np.array_equal(second.conditional[known(first)], first.conditional[known(first)])
    assert [each["pairs"] for each in second.manifest["jobs"]] == [56, 16]


def test_held_out_pairs_that_are_never_evaluated_are_not_scored(ranks, tmp_path):
    flags = ["--eval-pair-data", str(DATA / "heldout.jsonl"), "--eval-iters", "0"]
    ranks(1)(train, flags, train_iters=1, pair_cache_dir=str(tmp_path))
    assert len(known(scores_in(tmp_path))) == 8


def test_some_of_the_pairs_are_a_part_of_all_of_them(ranks, tmp_path):
    """--max-pairs is the beginning of the data: their scores are found, and completed for a longer run."""
    cache = {"pair_cache_dir": str(tmp_path)}
    ranks(1)(score, [], max_pairs=48, **cache)
    whole, before = scores_in(tmp_path), stamps(tmp_path)
    ranks(1)(train, [], max_pairs=24, **cache)
    assert stamps(tmp_path) == before
    ranks(1)(train, [], max_pairs=64, train_iters=8, **cache)
    longer = scores_in(tmp_path)
    assert len(longer) == 64 and np.isfinite(longer.unconditional).all()
    assert np.array_equal(longer.conditional[:48], whole.conditional)
    assert [job["pairs"] for job in longer.manifest["jobs"]] == [48, 16]


def test_pairs_that_were_too_long_before_are_scored_when_they_are_needed(ranks, tmp_path):
    job = {"pair_cache_dir": str(tmp_path), "max_pairs": 32, "train_iters": 4}
    short = ["--seq-length", "160", "--long-pairs", "drop"]
    ranks(1)(train, short, **job)
    some = scores_in(tmp_path)
    left_out = np.isnan(some.conditional).all(axis=1)
    assert 0 < left_out.sum() < 32
    ranks(1)(train, [], **job)
    found = scores_in(tmp_path)
    assert np.isfinite(found.conditional).all()
    assert np.array_equal(found.conditional[~left_out], some.conditional[~left_out])
    before = stamps(tmp_path)
    ranks(1)(train, short, **job)
    assert stamps(tmp_path) == before


def test_unconditional_scores_are_added_when_a_loss_needs_them(ranks, tmp_path, expected_run):
    job = {"pair_cache_dir": str(tmp_path), "train_iters": 6}
    ranks(1)(train, ["--preference-loss", "dpo"], **job)
    half = scores_in(tmp_path)
    assert np.isfinite(half.conditional).all() and np.isnan(half.unconditional).all()
    ranks(1)(train, [], **job)
    found = scores_in(tmp_path)
    assert np.array_equal(found.conditional, half.conditional)
    assert found.unconditional == pytest.approx(expected_run[1].unconditional, rel=1e-6)
    assert found.manifest["complete"] == {"pairs": 48, "scored": {"conditional": 48, "unconditional": 48}}
    before = stamps(tmp_path)
    ranks(1)(train, ["--preference-loss", "dpo"], **job)
    assert stamps(tmp_path) == before


def test_scores_are_in_the_datas_order_whatever_is_swapped(ranks, tmp_path, expected_run):
    """SafeDPO swaps pairs by their labels and drops those that are unsafe both ways."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:48]]
    labels = [(True, False), (False, True), (False, False), (True, True)]
    for row, (chosen, rejected) in zip(rows, itertools.cycle(labels)):
        row |= {"chosen_safe": chosen, "rejected_safe": rejected}
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranks(1)(score, ["--preference-loss", "safedpo", "--pair-data", str(data)], pair_cache_dir=str(tmp_path))
    found, expected = scores_in(tmp_path).conditional, expected_run[1].conditional
    assert np.isnan(found[2::4]).all()
    for kept in (0, 1, 3):
        assert found[kept::4] == pytest.approx(expected[kept::4], rel=1e-6)


# What does not fit


def score_and_tell(flags, **overrides):
    """On a rank: the blocks that ``score`` scores, their pairs by pack, and the length of the packs."""
    from unittest import mock

    from megatron_bdpo.training.reference.passes import GroupScorer

    call, told = GroupScorer.__call__, []

    def tell(scorer, blocks):
        told.extend(([block.groups.ids[pack].tolist() for pack in block.packs], block.length) for block in blocks)
        return call(scorer, blocks)

    with mock.patch.object(GroupScorer, "__call__", tell):
        score(flags, **overrides)
    return told


def score_and_write_each_call(flags, **overrides):
    """The same with a part for every call of the model, and one block in a call."""
    from unittest import mock

    from megatron_bdpo.training.reference import scoring_loop

    with mock.patch.multiple(scoring_loop, FLUSH_SECONDS=-1e9, _CALL_SECONDS=0, _PIPELINED_CALL_SECONDS=0):
        return score_and_tell(flags, **overrides)


@pytest.mark.parametrize("layout", [TP2, PP2, []], ids=["TP2", "PP2", "DP2"])
def test_a_damaged_part_is_scored_again(ranks, tmp_path, layout):
    """To the bit, whenever what is scored goes to disk: a part is of whole blocks, whose packs are their own."""
    flags = [*layout, "--reference-cache", str(tmp_path / "reference")]
    blocks = ranks(2)(score_and_write_each_call, flags, pair_cache_dir=str(tmp_path))[0]
    directory = tmp_path / "reference" / "train"
    expected, file = open_scores(directory), directory / "part-00002.safetensors"
    parts = len(list(directory.glob("part-*")))
    assert parts > 5
    file.write_bytes(file.read_bytes()[:-3])
    assert ranks(2)(score_and_tell, flags, pair_cache_dir=str(tmp_path))[0] == blocks[2:3]
    assert not file.exists() and len(list(directory.glob("part-*"))) == parts
    for kind in ("conditional", "unconditional"):
        assert np.array_equal(getattr(open_scores(directory), kind), getattr(expected, kind)), kind
    in_one = [*layout, "--reference-cache", str(tmp_path / "in-one-go")]
    assert ranks(2)(score_and_tell, in_one, pair_cache_dir=str(tmp_path))[0] == blocks
    found = open_scores(tmp_path / "in-one-go" / "train")
    assert len(list((tmp_path / "in-one-go" / "train").glob("part-*"))) == 1
    assert np.array_equal(found.conditional, expected.conditional)
    assert np.array_equal(found.unconditional, expected.unconditional)


def test_resident_values_are_told_apart_when_a_pair_comes_twice_in_a_step(ranks, tmp_path):
    """Six pairs, each five times an epoch: packs of one step begin with the same pair and go on with another."""
    job = {"max_pairs": 6, "pairs_per_step": 16, "train_iters": 2}
    flags = ["--pair-data", "5", str(DATA / "train.jsonl"), "--reference"]
    runs = {
        mode: last_stage(ranks(1)(train, [*flags, mode], pair_cache_dir=str(tmp_path), **job)).steps
        for mode in ("precomputed", "resident")
    }
    for step, expected in zip(runs["resident"], runs["precomputed"], strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "comprehension/chosen"):
            assert step[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
