"""The ablation: one small run of the whole, and its arithmetic on made metrics."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from examples import ablation, ablation_results

ROOT = Path(__file__).parents[3]

SMALL = ["--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--max-pairs", "16"]


@pytest.mark.slow
def test_two_steps_of_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the trainer's processes take the package from here
    output = tmp_path / "out put"
    command = ["--output", str(output), "--losses", "DPO", "SimPO", "--seeds", "1", "--jobs", "2"]
    command += ["--sft-epochs", "1", "--epochs", "1", "--pairs-per-step", "8", "--", *SMALL]
    assert ablation.main(command) == 0
    printed = capsys.readouterr().out
    assert "| loss | accuracy | gap | margin |" in printed
    with (output / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["seed"]) for row in rows] == [("DPO", "1"), ("SimPO", "1")]
    assert rows[0]["accuracy_q4"] and not rows[1]["accuracy_q4"]
    assert json.loads((output / "summary.json").read_text())["losses"]["DPO"]["accuracy"]["n"] == 1
    assert (output / "table.md").read_text() in printed
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    log = (output / "runs" / "dpo-seed-1" / "log.txt").read_text()
    assert "step 2/2" in log and "step 3" not in log
    # The reference is what the start has learned, and not all pairs are alike to it.
    metrics = [json.loads(line) for line in (output / "runs" / "dpo-seed-1" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["comprehension/imbalance"] > 0
    start = [json.loads(line) for line in (output / "runs" / "start" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["logps/chosen"] == pytest.approx(start[-1]["logps/chosen"], rel=1e-6)

    assert ablation.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 3

    assert ablation.main(["--lr", "0.5", *command]) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err


def make_run(directory: Path, loss: str, seed: int, accuracy: float) -> object:
    directory.mkdir(parents=True)
    held_out = {"kind": "evaluation", "logps/chosen": -100.0, "logps/rejected": -120.0, "rewards/accuracies": 0.5}
    after = {"logps/chosen": -101.0, "logps/rejected": -125.0, "rewards/accuracies": accuracy}
    records = [{**held_out, "iteration": 0}]
    for step in range(1, 7):
        step_values = {"loss": 0.1 * step, "rewards/margins": 1.0, "grad_norm": float(step)}
        records.append({"kind": "step", "iteration": step, "rewards/accuracies": 0.1 * step, **step_values})
    records.append({**held_out, **after, "iteration": 6})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ablation_results.Run(f"{loss} seed {seed}", loss, seed, directory, [])


def test_measures_and_their_spread(tmp_path):
    """Three passes of two steps: the last pass is steps 5 and 6."""
    runs = [make_run(tmp_path / str(seed), "DPO", seed, 0.6 + 0.1 * seed) for seed in (0, 1, 2)]
    rows = ablation_results.collect(runs, epochs=3)
    assert {key: value for key, value in rows[0].items() if "_q" not in key} == pytest.approx(
        {
            "loss": "DPO", "seed": 0, "accuracy": 0.6, "gap": -0.05, "margin": 4.0, "drift_chosen": -1.0,
            "drift_rejected": -5.0, "grad_norm": 5.5, "unsafe_declined": None, "harmless_answered": None,
        }
    )  # fmt: skip
    summary = ablation_results.summarise(rows)
    assert summary["DPO"]["accuracy"] == pytest.approx({"mean": 0.7, "sd": 0.1, "n": 3})
    assert "accuracy_q4" not in summary["DPO"]
    line = ablation_results.report(rows).splitlines()[2]
    assert line.startswith("| DPO | 0.700 ± 0.100 | -0.150 ± 0.100 | +4.00 ± 0.00 | -1.00 ± 0.00 |")
    assert line.endswith("| 5.50 ± 0.00 |")


def test_differences_are_between_runs_of_one_seed(tmp_path):
    """Seeds differ by more than losses do; within a seed the second loss is 0.05 and 0.07 better."""
    accuracies = {("DPO", 1): 0.5, ("B-DPO", 1): 0.55, ("DPO", 2): 0.7, ("B-DPO", 2): 0.77}
    runs = [make_run(tmp_path / f"{loss} {seed}", loss, seed, a) for (loss, seed), a in accuracies.items()]
    rows = ablation_results.collect(runs, epochs=3)
    (found,) = ablation_results.summarise(ablation_results.differences(rows)).values()
    assert found["accuracy"] == pytest.approx({"mean": 0.06, "sd": 0.02 / 2**0.5, "n": 2})
    table = ablation_results.report(rows).split("Difference from DPO with the same seed:\n\n")[1]
    assert table.splitlines()[2].startswith("| B-DPO | +0.060 ± 0.014 |")


def test_rates_have_a_row_of_the_base_and_quartiles_a_table(tmp_path):
    """Only the first run evaluates its start: the drift of the others is from there."""
    runs = [make_run(tmp_path / str(seed), "DPO", seed, 0.6) for seed in (1, 2)]
    for run, end in zip(runs, ("I can't help.", "Sure!"), strict=True):
        lines = (run.directory / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1]) | {"rewards/accuracies/imbalance_q1": 0.5, "rewards/margins/imbalance_q4": 2.0}
        first = lines[:1] if run is runs[0] else []
        (run.directory / "metrics.jsonl").write_text("\n".join([*first, *lines[1:-1], json.dumps(last)]) + "\n")
        answers = [(0, "unsafe", "Sure!"), (0, "harmless", "Yes.")] if run is runs[0] else []
        answers += [(6, "unsafe", end), (6, "harmless", "Yes.")]
        rows = [{"step": step, "kind": kind, "answer": answer} for step, kind, answer in answers]
        (run.directory / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = ablation_results.collect(runs, epochs=3)
    assert [(row["loss"], row["unsafe_declined"], row["harmless_answered"]) for row in rows] == [
        ("base", 0, 1),
        ("DPO", 1, 1),
        ("DPO", 0, 1),
    ]
    assert [row["drift_chosen"] for row in rows] == [None, -1.0, -1.0]
    text = ablation_results.report(rows)
    assert "| base | – | – | – | – | – | – | 0.000 | 1.000 |" in text
    assert "| DPO | 0.500 ± 0.000 | – | – | – | – | – | – | +2.00 ± 0.00 |" in text.split("by quartile")[1]


def test_the_held_out_part_is_the_same_for_every_seed(tmp_path):
    options = ablation.parse(["--output", str(tmp_path), "--pair-data", "2", "a.jsonl.gz", "some/dataset"])
    start, runs = ablation.plan(options)
    expected = "--pair-data 2 a.jsonl.gz some/dataset --eval-share 0.2 --eval-seed 0"
    assert start is not None and {run.seed for run in runs} == {1, 2, 3}
    assert all(expected in " ".join(run.flags) for run in (start, *runs))


def held_out_by(rows: list[list[str]]) -> list[tuple[list[str] | None, float, int | None]]:
    """What each command line holds out."""
    from megatron_bdpo.training.flags.arguments import Arguments

    parsed = (Arguments.parse(flags).settings.pairs for flags in rows)
    return [(pairs.eval_pair_data, pairs.eval_share, pairs.eval_seed) for pairs in parsed]


def test_a_recipes_held_out_pairs_give_way(ranks, tmp_path):
    """The tiny one has data of its own, another may have a share: a run with both is refused."""
    shared = tmp_path / "shared.yaml"
    shared.write_text("eval-share: 0.02\neval-seed: 3\n")
    words = [["--pair-data", "a.jsonl"], ["--recipe", str(shared), "--eval-pair-data", "b.jsonl"]]
    rows = [ablation.plan(ablation.parse(["--output", str(tmp_path), *each]))[1][0].flags for each in words]
    assert ranks(1)(held_out_by, rows)[0] == [(None, 0.2, 0), (["b.jsonl"], 0.0, None)]


def test_a_run_that_fails_is_named(tmp_path, capsys):
    assert ablation.main(["--output", str(tmp_path), "--launcher", "false", "--no-plot"]) == 2
    error = capsys.readouterr().err
    assert "start ended with exit code 1" in error and "log.txt" in error


def test_the_real_models_runs_are_the_recipes():
    """What the ablation settles itself is what examples/smollm2 trains with, so that its B-DPO is that of the story."""
    options = ablation.parse(["--model", "smollm2"])
    recipe = yaml.safe_load(options.recipe.read_text("utf-8"))
    own = {
        "pairs-per-step": options.pairs_per_step, "pair-epochs": options.epochs, "seq-length": options.seq_length,
        "lr": options.lr, "beta": options.beta, "bdpo-temperature": options.bdpo_temperature,
    }  # fmt: skip
    assert {name: type(value)(recipe[name]) for name, value in own.items()} == own


def options_of(rows: list[list[str]]) -> list[str]:
    """The loss of each command line with its options, defaults filled in; or why it cannot have them."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.losses import LossFunction
    from megatron_bdpo.training.flags.arguments import Arguments

    found = []
    for flags in rows:
        try:
            found.append(LossFunction(*Arguments.parse(flags).settings.loss.build()).describe())
        except UserError as error:
            found.append(str(error))
    return found


def test_every_row_has_its_own_options_whatever_the_recipe_has(ranks):
    """The recipe is B-DPO's; a loss refuses what it does not use: SafeDPO has no temperature, SimPO another beta."""
    options = ablation.parse(["--model", "smollm2", "--seeds", "1"])
    _, runs = ablation.plan(options)
    (found,) = ranks(1)(options_of, [run.flags for run in runs])
    by_loss = dict(zip((run.loss for run in runs), found, strict=True))
    assert by_loss["SafeDPO"].startswith("safedpo, beta 0.1,")
    assert by_loss["SimPO"].startswith("simpo, beta 2.0,")
    assert "temperature inf" in by_loss["DPO"] and "temperature auto" in by_loss["B-DPO"]
    assert "temperature 0.25" in by_loss["B-DPO, τ = 0.25"]
    assert set(by_loss) == set(ablation.LOSSES)
