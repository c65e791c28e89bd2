"""Starting a run once more: longer, on another model, in a directory that is used, after its end."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from tests.distributed.test_bad_input import refusal
from tests.harness.jobs import last_stage, score, train

JOB = ["--num-layers", "1", "--save-interval", "2"]
COSINE = ["--lr-decay-style", "cosine"]
WSD = ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "1", "--lr-wsd-decay-style", "linear"]
TRACKER = "latest_checkpointed_iteration.txt"


def told(function, *arguments, **overrides):
    """What it returns, and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return function(*arguments, **overrides), printed.getvalue()


def steps(outcomes):
    return [step["iteration"] for step in last_stage(outcomes).steps]


def in_place(directory, *flags):
    return [*JOB, "--save", str(directory), "--load", str(directory), *flags]


@pytest.mark.parametrize(
    "schedule",
    [[], ["--lr-warmup-fraction", "0.5"], [*COSINE, "--lr-decay-iters", "2"]],
    ids=["constant", "warm-up", "cosine that has ended"],
)
def test_a_finished_run_becomes_longer(ranks, tmp_path, schedule):
    """Where all steps that are done would have had the same rate: without a further flag."""
    ranks(1)(train, in_place(tmp_path, *schedule, "--train-iters", "2"))
    longer = ranks(1)(train, in_place(tmp_path, *schedule, "--train-iters", "4"))
    assert steps(longer) == [3, 4]
    expected_rates = {"cosine": 0.0}.get("cosine" if "cosine" in schedule else "", 1e-3)
    assert [step["learning_rate"] for step in longer[0].steps] == pytest.approx([expected_rates] * 2)
    (again,) = ranks(1)(train, in_place(tmp_path, *schedule, "--train-iters", "4"))
    assert again.steps == []


def test_another_warm_up_is_refused(ranks, tmp_path):
    ranks(1)(train, in_place(tmp_path, "--train-iters", "2"))
    (message,) = ranks(1)(refusal, in_place(tmp_path, "--train-iters", "4", "--lr-warmup-fraction", "0.5"))
    assert "step 1 of the 2 that are done had the learning rate 0.001" in message, message


def test_by_epochs(ranks, tmp_path):
    flags = [*JOB, "--save", str(tmp_path), "--load", str(tmp_path), "--pair-epochs"]
    first = ranks(1)(train, [*flags, "1"], train_iters=None)
    expected = len(first[0].steps)
    longer = ranks(1)(train, [*flags, "2"], train_iters=None)
    assert steps(longer) == list(range(expected + 1, 2 * expected + 1))


def test_wsd_goes_on_from_before_its_decay(ranks, tmp_path):
    """A decay is a branch of the run: the same checkpoint goes on for longer, too."""
    ranks(1)(train, in_place(tmp_path, *WSD, "--train-iters", "4", "--exit-interval", "2"))
    longer = ranks(1)(train, in_place(tmp_path, *WSD, "--train-iters", "6"))
    assert [step["learning_rate"] for step in longer[0].steps] == pytest.approx([1e-3] * 3 + [0.0])
    (message,) = ranks(1)(refusal, in_place(tmp_path, *COSINE, "--train-iters", "8"))
    assert "step 2 of the 6 that are done had the learning rate 0.001 (WSD over 6 steps)" in message, message


def test_a_cosine_is_refused_and_the_ways_out_work(ranks, tmp_path):
    ranks(1)(train, in_place(tmp_path, *COSINE, "--train-iters", "2"))
    longer = in_place(tmp_path, *COSINE, "--train-iters", "4")
    (message,) = ranks(1)(refusal, longer)
    assert "\n" not in message
    expected = (
        r"step 2 of the 2 .* 0\.0005 \(cosine over 2 steps\), and would have 0\.00085\d* here \(cosine over 4 steps"
    )
    assert re.search(expected, message), message
    kept = ranks(1)(train, [*longer, "--use-checkpoint-opt-param-scheduler", "--exit-interval", "3"])
    assert [step["learning_rate"] for step in kept[0].steps] == [0.0]
    anew = ranks(1)(train, in_place(tmp_path, *COSINE, "--train-iters", "6", "--override-opt-param-scheduler"))
    expected_rates = [1e-3 * 0.25, 1e-3 * 0.0669873, 0.0]
    assert [step["learning_rate"] for step in anew[0].steps] == pytest.approx(expected_rates, abs=1e-9)


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_another_model_is_refused_with_its_fields(ranks, tmp_path, flag):
    ranks(1)(train, in_place(tmp_path / "run", "--train-iters", "2"))
    other = ["--save", str(tmp_path / "other"), "--save-interval", "2", flag, str(tmp_path / "run")]
    (message,) = ranks(1)(refusal, ["--num-layers", "2", *other], ffn_hidden_size=128)
    expected = "holds another model: num_layers: 1 there, 2 here; ffn_hidden_size: 64 there, 128 here"
    assert expected in message and "\n" not in message, message
    assert not list((tmp_path / "other").glob("recipe*")), "a failed start leaves nothing behind"


def test_a_used_directory_goes_on_with_its_own_run(ranks, tmp_path):
    flags = [*JOB, "--save", str(tmp_path)]
    ranks(1)(train, [*flags, "--train-iters", "4", "--exit-interval", "2"])
    ((resumed, printed),) = ranks(1)(told, train, [*flags, "--train-iters", "6"])
    assert [step["iteration"] for step in resumed.steps] == [3, 4, 5, 6]
    assert "holds step 2 of this run" in printed and "resumed at step 2 of 6" in printed
    assert re.search(rf"finished; next: `megatron-bdpo report {tmp_path}`", printed), printed
    ((again, printed),) = ranks(1)(told, train, [*flags, "--train-iters", "6"])
    assert again.steps == [] and "already finished at step 6 of 6: nothing to train" in printed


def test_a_used_directory_of_another_run_is_refused(ranks, tmp_path):
    flags = [*JOB, "--save", str(tmp_path), "--train-iters", "2"]
    ranks(1)(train, flags)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (message,) = ranks(1)(refusal, [*flags, "--lr", "2e-3"])
    assert f"--save {tmp_path} holds step 2 of another run (lr: nothing there, 2e-3 here)" in message, message
    assert f"--load {tmp_path}" in message and "--overwrite" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    anew = ranks(1)(train, [*flags, "--lr", "2e-3", "--overwrite"])
    assert steps(anew) == [1, 2]


def test_an_imported_checkpoint_is_not_written_over(ranks, tmp_path):
    """Or any that left no recipe."""
    flags = [*JOB, "--save", str(tmp_path), "--train-iters", "2"]
    ranks(1)(train, flags)
    (tmp_path / "recipe.yaml").unlink()
    for tracker, expected in (("2", "step 2"), ("release", "a checkpoint")):
        (tmp_path / TRACKER).write_text(tracker)
        (message,) = ranks(1)(refusal, flags)
        assert f"holds {expected} of a run that left no recipe" in message, message


def test_scoring_beside_a_run_that_has_begun(ranks, tmp_path):
    """It has no steps: neither its schedule nor the directory's checkpoints are of concern."""
    ranks(1)(train, in_place(tmp_path, *COSINE, "--train-iters", "2"))
    directories = ranks(1)(score, [*JOB, "--save", str(tmp_path), "--lr", "7e-3"])[0]
    assert directories == ranks(1)(score, in_place(tmp_path, "--lr", "7e-3", "--train-iters", "9"))[0]
