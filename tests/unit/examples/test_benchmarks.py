"""The benchmarks run, at a size where nothing is learned from them."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def run(*command: object) -> str:
    """What a benchmark prints; it has to end well."""
    ended = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.slow
def test_planning():
    output = run(BENCHMARKS / "planning.py", "--pairs", 3000, "--ranks", 4, "--pairs-per-step", 64)
    for part in (
        "plan one epoch",
        "open the store on 4 ranks",
        "look the reference scores up",
        "compute the temperature",
    ):
        assert f"\n{part}" in output
    size = ["--ranks", 4, "--pairs-per-step", 64, "--without-scores"]
    table = run(BENCHMARKS / "planning.py", "--pairs", 1000, 3000, *size)
    assert table.startswith("| | 1,000 | 3,000 |") and "look the reference" not in table
    assert re.search(r"plan one epoch \| [\d.]+ s, \d+ MiB \| [\d.]+ s, \d+ MiB \|", table)


@pytest.mark.slow
def test_quality():
    output = run(BENCHMARKS / "quality.py", "--pairs", 1000, "--held-out", 50)
    assert re.search(r"copies of an earlier pair +10 +1,000 +1\.00%", output)


@pytest.mark.slow
def test_start_up():
    """The tree beside itself; of what is quick."""
    output = run(BENCHMARKS / "start_up.py", "--tree", f"same={BENCHMARKS.parent}", "--rounds", 1, "--commands", 0, 2)
    assert "|  | same: processor; clock | now: processor; clock |" in output
    assert re.search(r"--pairs-per-stp 8` \| 0\.\d\d; \d+\.\d\d \| 0\.\d\d; \d+\.\d\d \|", output)


@pytest.mark.slow
def test_data_check():
    output = run(BENCHMARKS / "data_check.py", "--rows", 300, "--rounds", 1)
    for name in ("data check", "load", "parse"):
        assert re.search(rf"\| {name} \| 300 \| \d+\.\d \| \d+\.\d \| \d+ \|", output), output


@pytest.mark.slow
def test_fill(tmp_path):
    few = ["--pairs=2000", "--steps=20", "--pairs-per-step", 8, 64, "--ranks", 1, "--seq-length=4096", "--multiples=8"]
    run(BENCHMARKS / "fill.py", *few, "--csv", tmp_path / "plans.csv")
    with (tmp_path / "plans.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2  # data, pairs per step, pipeline stages
    for row in rows:
        assert 0.95 <= float(row["fill"]) <= 1
        assert float(row["fill_of_one_length"]) <= float(row["fill"])


@pytest.mark.slow
def test_scoring():
    size = ["--pairs", 16, "--layers", 1, "--hidden", 64, "--seq-length", 512, "--pairs-per-step", 4]
    output = run(BENCHMARKS / "scoring.py", BENCHMARKS.parent / "examples" / "data" / "train.jsonl", *size)
    for name in ("scoring", "one training epoch", "the same, prompts not shared"):
        assert f"\n| {name} | 16 |" in output


@pytest.mark.slow
def test_hf_export(tmp_path):
    """Two ranks write half each, and half of each half has come from the other one."""
    from tests.harness.tiny_models import make_model

    model = make_model("llama", tmp_path)
    layout = ["--tensor-model-parallel-size", "2"]
    output = run(BENCHMARKS / "hf_export.py", model, tmp_path / "out", "--ranks", 2, "--rounds", 1, "--", *layout)
    (row,) = [line for line in output.splitlines() if line.startswith("| this checkout | 1 |")]
    assert row.split("|")[-2].count(",") == 1, "a file of each rank"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_log_probs(tmp_path):
    """Every run is on record, and the variants agree: the script itself stops when they do not."""
    shape = ["--positions", "48", "--hidden", "8", "--vocab", "96", "--device", "cpu", "--repeats", "1"]
    variants = ["plain", "fused", "fused, main_grad"]
    output = run(BENCHMARKS / "logprobs.py", *shape, "--variants", *variants, "--csv", tmp_path / "runs.csv")
    for name in variants:
        assert f"| {name} |" in output
    with (tmp_path / "runs.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == variants


TINY = ["--hidden=32", "--layers=1", "--heads=4", "--groups=2", "--ffn=48", "--vocab=400", "--rounds=1"]


def measured(script: str, flags: list[str], directory: Path) -> tuple[str, list[dict[str, str]]]:
    """What a benchmark prints, and the rows of its CSV."""
    output = run(BENCHMARKS / script, *TINY, *flags, "--csv", directory / "runs.csv")
    with (directory / "runs.csv").open() as file:
        return output, list(csv.DictReader(file))


@pytest.mark.slow
def test_vs_trl(tmp_path):
    """Ours and TRL take the same steps; a contender that cannot run is named with the reason."""
    pytest.importorskip("trl")
    flags = ["--contenders", "ours", "trl", "trl, padding-free", "--pairs-per-step=4", "--steps=3", "--warm-up=1"]
    output, rows = measured("vs_trl.py", flags, tmp_path)
    ours, trl = rows[:2]
    assert [ours["contender"], trl["contender"]] == ["ours", "trl"]
    assert json.loads(trl["losses"]) == pytest.approx(json.loads(ours["losses"]), abs=1e-4)
    assert len(set(json.loads(ours["losses"]))) == 3, "losses that do not move compare nothing"
    assert len(rows) == 3 or "padding-free: did not run" in output


@pytest.mark.slow
def test_groups(tmp_path):
    """Groups, their pairs and TRL take the same steps; the groups' positions are those of the arithmetic."""
    pytest.importorskip("trl")
    flags = ["--lengths", "20", "30", "--rows-per-step=2", "--steps=3", "--rounds=1"]
    output, (groups, pairs, trl) = measured("groups.py", flags, tmp_path)
    losses = {row["contender"]: json.loads(row["losses"]) for row in (groups, pairs, trl)}
    assert losses["pairs"] == pytest.approx(losses["groups"], abs=1e-6)
    assert losses["trl"] == pytest.approx(losses["groups"], abs=1e-5)
    assert len(set(losses["groups"])) == 3, "losses that do not move compare nothing"
    assert 3 < float(pairs["positions"]) / float(groups["positions"]) < 4 and "times the positions" in output


@pytest.mark.slow
def test_lora(tmp_path):
    """From the same adapters, ours and TRL's take the same steps."""
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    _, rows = measured("lora.py", ["--pairs-per-step=4", "--steps=3", "--warm-up=1", "--rank=4"], tmp_path)
    losses = {row["contender"]: json.loads(row["losses"]) for row in rows}
    assert losses["trl, LoRA"] == pytest.approx(losses["ours, LoRA"], abs=1e-5)
    assert losses["ours, LoRA"] != pytest.approx(losses["ours"], abs=1e-5)
    assert len(set(losses["ours, LoRA"])) == 3, "losses that do not move compare nothing"


@pytest.mark.slow
def test_sharing(tmp_path):
    """Sharing saves the tokens that it should, and what is promised lies above 1."""
    output, rows = measured("sharing.py", ["--shares=50", "--length=32", "--pairs-per-step=4", "--steps=3"], tmp_path)
    made_up = rows[0]
    assert float(made_up["tokens_saved"]) == pytest.approx(0.25, abs=0.05)  # one of two prompts, each half a sequence
    assert [row["contender"] for row in rows] == ["shared", "not shared"] * 2
    operations = {row["contender"]: float(row["operations"]) for row in rows[:2]}
    assert operations["shared"] < operations["not shared"]
    assert "of the ideal" in output


@pytest.mark.slow
def test_scaling(tmp_path):
    """One point beside the first; the parts of a step are the step."""
    few = ["--pairs", "--lengths", "--layer-counts", "--vocabularies=500", "--prompt=12", "--response=12"]
    _, rows = measured("scaling.py", few, tmp_path)
    assert [row["contender"] for row in rows] == ["base", "vocabulary 500"]
    for row in rows:
        parts = {name: float(value) for name, value in row.items() if name.endswith("_seconds_a_step")}
        assert sum(parts.values()) == pytest.approx(float(row["seconds"]), rel=0.05)
        assert all(parts[f"{name}_seconds_a_step"] > 0 for name in ("forward", "log-probs", "backward", "optimizer"))


@pytest.mark.slow
def test_fp8_on_a_cpu(tmp_path):
    """The variants that a CPU has: the rows are complete, and the first step is as near as the gate wants it."""
    flags = ["--variants", "bf16", "fp32", "--pairs-per-step=4", "--steps=4", "--warm-up=1"]
    output, rows = measured("fp8.py", flags, tmp_path)
    assert [row["contender"] for row in rows] == ["bf16", "fp32"]
    for row in rows:
        assert float(row["step_zero_loss_share"]) <= 1 and float(row["step_zero_log_ratio_share"]) <= 1
        assert len(set(json.loads(row["losses"]))) == 4, "losses that do not move compare nothing"
    assert "| bf16 |" in output
    assert "| loss, step 4 |" in output


def test_losses_along_the_way_leave_out_skipped_steps():
    from benchmarks.fp8 import around

    assert around([math.nan, 4.0, 2.0, 9.0], 3, width=2) == 3.0
    assert around([math.nan, 4.0, 2.0], 2) == 4.0
    assert math.isnan(around([math.nan, 4.0], 1))


@pytest.mark.slow
def test_fp8_command_lines_are_accepted():
    """Where no GPU is needed: by the dry run of every recipe's job."""
    few = ["--pairs-per-step=4", "--steps=4", "--small"]
    output = run(BENCHMARKS / "fp8.py", "--check", *few)
    for variant in ("bf16", "tensorwise", "blockwise", "mxfp8"):
        assert f"# round 1, {variant}: command line accepted" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp8_without_a_gpu_is_refused_in_two_lines():
    result = subprocess.run([sys.executable, BENCHMARKS / "fp8.py"], capture_output=True, text=True)
    assert result.returncode == 2
    error, advice = result.stderr.splitlines()
    assert error == "error: FP8 cannot run here: there is no GPU."
    assert advice.startswith("advice: Use --variants bf16 fp32")


@pytest.mark.slow
def test_the_gpu_script_asks_for_what_the_benchmarks_know():
    """Without a GPU it stops before them; on one, a flag that is gone would cost a machine's time."""
    script = (BENCHMARKS.parent / "tests" / "gpu" / "run_all.sh").read_text()
    lines = [line.split() for line in script.replace("\\\n", " ").splitlines() if line.startswith("    benchmark ")]
    shared = script.split("step_of=(")[1].split(")")[0].split()
    assert sum(int(line[2]) for line in lines) + 180 <= 12 * 60
    for _, _, _, name, *flags in lines:
        if '"${step_of[@]}"' in flags:
            flags += shared
        known = run(BENCHMARKS / name, "--help")
        assert [flag for flag in [*flags, "--csv"] if flag.startswith("--") and flag not in known] == [], name


def test_operations_are_those_of_a_count_by_hand():
    from benchmarks.common import flops
    from benchmarks.common.models import Shape

    shape = Shape(hidden=4, layers=3, heads=2, groups=1, ffn=5, vocab=7)
    lengths = np.array([[2, 1, 3]])  # prompt 2; answers 1 and 3
    matrices = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5  # query, key and value of half the size, output, three of the MLP
    expected_shared = flops.Work(
        linear=3 * 2 * 3 * matrices * (2 + 1 + 3),
        attention=3 * 4 * 3 * 4 * ((1 + 2) + 3 + (3 + 4 + 5)),  # what each of the six queries sees
        output=3 * 2 * 4 * 7 * (1 + 3),
    )
    assert flops.work(shape, lengths, share_prompts=True) == expected_shared
    expected_apart = flops.Work(
        linear=3 * 2 * 3 * matrices * (3 + 5),
        attention=3 * 4 * 3 * 4 * ((1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)),
        output=expected_shared.output,
    )
    assert flops.work(shape, lengths, share_prompts=False) == expected_apart
