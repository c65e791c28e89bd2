"""What a run reports: to TensorBoard, at evaluations, and with packs that hold nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bdpo.cli.main import main
from megatron_bdpo.training.reference.cache import open_scores
from tests.harness.jobs import DATA, FEW_HELD_OUT, last_stage, scores_in, train
from tests.harness.parity import assert_same_steps

HELD_OUT = ["--eval-pair-data", str(FEW_HELD_OUT), "--eval-interval", "2", "--eval-at-start"]
TP2 = ["--tensor-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def on_one_rank(ranks, tmp_path_factory):
    return last_stage(ranks(1)(train, HELD_OUT, pair_cache_dir=str(tmp_path_factory.mktemp("one"))))


@pytest.fixture(scope="module")
def on_two_ranks(ranks, tmp_path_factory):
    """Of data parallelism."""
    return last_stage(ranks(2)(train, HELD_OUT, pair_cache_dir=str(tmp_path_factory.mktemp("two"))))


def test_tensorboard_has_the_metrics_by_their_known_names(ranks, tmp_path):
    ranks(2)(train, [*HELD_OUT, "--tensorboard-dir", str(tmp_path / "tb")], pair_cache_dir=str(tmp_path))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    expected = {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "comprehension/chosen", "comprehension/rejected", "comprehension/imbalance",
        "weights/chosen", "weights/rejected", "scale", "throughput/pairs_per_second", "throughput/tokens_per_second",
        "loss validation", "rewards/accuracies validation", "rewards/margins/imbalance_q4",
        "loss/imbalance_q1 validation",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert not [name for name in events.Tags()["scalars"] if name.startswith("_")]
    assert [event.step for event in events.Scalars("rewards/margins")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("rewards/margins validation")] == [0, 2, 3]


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world_size", [1, 4])
def test_metrics_file_has_every_step_and_evaluation(ranks, tmp_path, world_size):
    layout = ["--pipeline-model-parallel-size", "2"] if world_size > 1 else []
    outcome = last_stage(
        ranks(world_size)(train, [*HELD_OUT, *layout, "--save", str(tmp_path), "--save-interval", "3"])
    )
    records = metrics_of(tmp_path)
    places = [(record.pop("kind"), record["iteration"]) for record in records]
    expected_places = [("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("evaluation", 3)]
    assert places == expected_places
    assert [record for (kind, _), record in zip(places, records, strict=True) if kind == "step"] == outcome.steps
    assert {"learning_rate", "grad_norm"} <= outcome.steps[0].keys()
    assert outcome.steps[0]["learning_rate"] == pytest.approx(1e-3)


def test_record_of_the_run(ranks, tmp_path, capsys):
    """What the run is, from which the report finds temperature and scores."""
    flags = [*HELD_OUT, "--bdpo-temperature", "0.25", "--save", str(tmp_path), "--save-interval", "3"]
    ranks(2)(train, flags, train_iters=6)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["loss"] == "bdpo" and record["loss_options"]["bdpo_temperature"] == 0.25
    assert record["pairs"] == {"train": 48, "heldout": 19}
    scores = open_scores(record["reference_scores"]["train"])
    imbalance = np.abs(np.diff((scores.conditional - scores.unconditional) / scores.tokens)).ravel()
    assert record["imbalance_quartiles"] == pytest.approx(np.quantile(imbalance, [0.25, 0.5, 0.75]).tolist())
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "comprehension of 48 of 48 pairs, nats per token; weights and scale at tau 0.25" in printed
    assert len(list((tmp_path / "report").glob("*.png"))) == 17


def test_resumed_run_continues_the_metrics_file(ranks, tmp_path):
    """Steps after the checkpoint are done again and are there once; a run that is at its end adds nothing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*HELD_OUT, "--train-iters", "4", "--save-interval", "2"]
    ranks(1)(train, [*flags, "--save", str(whole)])
    resume = [*flags, "--save", str(parts), "--load", str(parts)]
    ranks(1)(train, [*resume, "--exit-interval", "3"])
    checkpoint = parts / "latest_checkpointed_iteration.txt"
    checkpoint.write_text("2")  # as if it had been killed after step 3
    for _ in range(2):
        ranks(1)(train, resume)
        found, expected = (
            [{k: v for k, v in line.items() if not k.startswith("throughput")} for line in metrics_of(run)]
            for run in (parts, whole)
        )
        assert found == expected


def test_quartiles_of_imbalance(on_one_rank, on_two_ranks):
    """Of the training pairs' own quartiles, whatever the layout; together they are the metric of all pairs."""
    expected, found = on_one_rank, on_two_ranks
    assert_same_steps(found.steps + found.evaluations, expected.steps + expected.evaluations)
    for record in expected.steps + expected.evaluations:
        shares = {q: record.get(f"pairs/imbalance_{q}", 0.0) for q in ("q1", "q2", "q3", "q4")}
        assert sum(shares.values()) == pytest.approx(1)
        for name in ("loss", "rewards/accuracies", "rewards/margins"):
            together = sum(share * record[f"{name}/imbalance_{q}"] for q, share in shares.items() if share)
            assert together == pytest.approx(record[name], abs=1e-6), name


@pytest.mark.parametrize("flags", ["--preference-loss dpo", "--preference-loss simpo", "--reference resident"])
def test_no_quartiles_where_the_imbalance_is_not_known(ranks, tmp_path, flags):
    outcome = last_stage(ranks(1)(train, flags.split(), train_iters=1, pair_cache_dir=str(tmp_path)))
    assert not [name for name in outcome.steps[0] if "quartile" in name or "imbalance_q" in name]


def test_evaluation_covers_all_held_out_pairs_on_every_layout(ranks, tmp_path, on_one_rank, on_two_ranks):
    """Whichever pairs share a pack: on one rank all may, on two they are an odd number."""
    expected = on_one_rank.evaluations
    assert [record["iteration"] for record in expected] == [0, 2, 3]
    tensor = last_stage(ranks(2)(train, [*HELD_OUT, *TP2], pair_cache_dir=str(tmp_path)))
    for found in (on_two_ranks, tensor):
        assert_same_steps(found.evaluations, expected)


def test_experts_are_evaluated_too(ranks, tmp_path):
    """After the last step as well, where no step follows whose tokens their auxiliary losses would be means over."""
    experts = ["--num-experts", "4", "--moe-aux-loss-coeff", "0.01"]
    outcome = last_stage(ranks(1)(train, [*HELD_OUT, *experts], pair_cache_dir=str(tmp_path)))
    assert [record["iteration"] for record in outcome.evaluations] == [0, 2, 3]


def test_share_held_out_from_training_data(ranks, tmp_path):
    outcome = last_stage(ranks(1)(train, ["--eval-share", "0.25", "--eval-at-start"], pair_cache_dir=str(tmp_path)))
    assert len(outcome.evaluations) == 2


@pytest.mark.parametrize("pairs", ["3", "5"])
def test_ranks_with_uneven_and_empty_packs_agree_with_one_rank(ranks, tmp_path, pairs):
    """Each pair counts once, wherever it is: the step is the mean over its pairs, not over packs or ranks."""
    flags = ["--pairs-per-step", pairs, "--pipeline-model-parallel-size"]
    expected = ranks(1)(train, [*flags, "1"], pair_cache_dir=str(tmp_path / "one"))
    interleaved = ["--num-layers-per-virtual-pipeline-stage", "1"]  # needs packs in groups of two
    found = ranks(4)(train, [*flags, "2", *interleaved], pair_cache_dir=str(tmp_path / "four"))
    assert_same_steps(last_stage(found).steps, last_stage(expected).steps)


#: (chosen, rejected) unsafe, and the same as SafeDPO trains the pair: in order, or None where it is dropped.
LABELS = [((0, 1), (0, 1)), ((1, 0), (0, 1)), ((0, 0), (0, 0)), ((1, 1), None), ((1, 0), (0, 1))]


def write_labelled(rows, labels, path):
    with path.open("w") as file:
        for row, (chosen_unsafe, rejected_unsafe) in zip(rows, labels, strict=True):
            file.write(
                json.dumps(row | {"chosen_safe": not chosen_unsafe, "rejected_safe": not rejected_unsafe}) + "\n"
            )


def test_safety_labels_swap_and_drop(ranks, tmp_path):
    """A run trains what it would train of pairs that somebody has put in order before: answers and labels."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[: 2 * len(LABELS)]]
    given, expected = zip(*(2 * LABELS), strict=True)
    write_labelled(rows, given, tmp_path / "given.jsonl")
    kept = [
        row if unsafe == ordered else row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        for row, unsafe, ordered in zip(rows, given, expected, strict=True)
        if ordered
    ]
    write_labelled(kept, [ordered for ordered in expected if ordered], tmp_path / "expected.jsonl")
    flags = ["--preference-loss", "safedpo", "--safedpo-delta", "2", "--pairs-per-step", "8"]
    of = {
        name: last_stage(ranks(1)(train, flags, pair_data=[str(tmp_path / f"{name}.jsonl")], train_iters=2)).steps
        for name in ("given", "expected")
    }
    assert_same_steps(of["given"], of["expected"])
    to_exceed = np.array([2.0 * (unsafe[1] - unsafe[0]) for unsafe in expected if unsafe])
    assert of["given"][0]["loss"] == pytest.approx(np.log1p(np.exp(to_exceed)).mean(), rel=1e-6), "policy is reference"


def test_the_reference_reaches_the_loss_in_double_precision(ranks, tmp_path):
    """Sums of hundreds of nats: single precision rounds them by up to 3e-5, while policy and reference are the same."""
    before = last_stage(ranks(1)(train, [], pair_cache_dir=str(tmp_path), train_iters=1)).steps[0]
    assert before["logps/chosen"] < -256
    assert max(abs(before[f"rewards/{name}"]) for name in ("chosen", "rejected")) < 1e-9


def test_reference_cache_grows_with_the_pairs_that_are_used(ranks, tmp_path):
    """Pairs left out of one run are scored when another run needs them, and only those."""
    import numpy as np

    def scored_pairs():
        values = scores_in(tmp_path).conditional
        return int(np.isfinite(values).all(axis=1).sum()), values

    flags = ["--train-iters", "6", "--long-pairs", "drop", "--seq-length"]
    ranks(1)(train, [*flags, "176"], pair_cache_dir=str(tmp_path))
    some, before = scored_pairs()
    ranks(1)(train, [*flags, "512"], pair_cache_dir=str(tmp_path))
    everything, after = scored_pairs()
    assert 8 < some < everything == 48
    kept = np.isfinite(before)
    assert np.array_equal(before[kept], after[kept])


def test_weighted_sources(ranks, tmp_path):
    """Weight 2 is two visits per pair and epoch, 0.5 is half of the pairs: 2 x 396 + 0.5 x 99 pairs make one epoch."""
    sources = ["--pair-data", "2", str(DATA / "train.jsonl"), "0.5", str(DATA / "heldout.jsonl")]
    flags = [*sources, "--pair-epochs", "0.02"]
    overrides = {"max_pairs": None, "train_iters": None, "pair_cache_dir": str(tmp_path)}
    outcome = last_stage(ranks(1)(train, flags, **overrides))
    expected_steps = round((2 * 396 + 0.5 * 99) * 0.02 / 8)
    assert len(outcome.steps) == expected_steps
