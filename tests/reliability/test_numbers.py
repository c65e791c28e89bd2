"""Numbers that are not finite end a run before a checkpoint holds them; pairs at the edges do not make such numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from torch import distributed

from megatron_bdpo.training.callbacks.callback import Callback
from tests.distributed.test_bad_input import write
from tests.harness.jobs import last_stage, run_job, train

JOB = ["--num-layers", "1", "--train-iters", "3", "--tensor-model-parallel-size", "2"]


def train_with(fault, flags, **overrides):
    """The tiny job on this rank with a fault in it: (message of the error, steps done, checkpoints left)."""
    from pathlib import Path

    from megatron_bdpo.errors import UserError

    callbacks, run_type = FAULTS[fault]()
    try:
        _, exit_code = run_job(flags, overrides, callbacks, run_type=run_type)
    except UserError as error:
        message, exit_code = str(error), error.is_final
    except RuntimeError as error:  # the rank that waits for the one with the fault
        message, exit_code = str(error), None
    else:
        message = ""
    save = flags[flags.index("--save") + 1]
    tracker = Path(save) / "latest_checkpointed_iteration.txt"
    return message, exit_code, tracker.read_text() if tracker.exists() else ""


def broken_loss():
    """One pair's log-prob is NaN in the second step."""
    from megatron_bdpo.training.run import PreferenceRun

    class Faulty(PreferenceRun):
        def before_training(self, evaluate):
            class Loss(type(self.step.loss)):
                def __call__(inner, pairs):
                    if self.iteration == 1:
                        chosen = pairs.policy_chosen.clone()
                        chosen[0] = math.nan
                        pairs = dataclasses.replace(pairs, policy_chosen=chosen)
                    return super().__call__(pairs)

            self.step.loss = Loss(self.step.loss.spec, self.step.loss.options)
            super().before_training(evaluate)

    return [], Faulty


def broken_gradient(step, value):
    """A gradient gets a value that is not finite, on the first rank only."""

    class Faulty(Callback):
        done = 0

        def after_load(self, start):
            def spoil(gradient):
                gradient = gradient.clone()
                if self.done == step - 1:
                    gradient.view(-1)[0] = value
                return gradient

            if distributed.get_rank() == 0:
                next(start.model[0].parameters()).register_hook(spoil)

        def after_step(self, step):
            self.done = step.iteration

    return [Faulty()], None


def broken_weights():
    """The second step leaves a weight that is not finite, as a broken optimizer kernel would."""

    class Faulty(Callback):
        def after_load(self, start):
            self.weight = next(start.model[0].parameters())

        def after_step(self, step):
            if step.iteration == 2 and distributed.get_rank() == 1:
                self.weight.data.view(-1)[0] = math.inf

    return [Faulty()], None


#: Name -> the callbacks and the run that have it.
FAULTS = {
    "none": lambda: ([], None),
    "loss": broken_loss,
    "first gradient": lambda: broken_gradient(1, math.nan),
    "gradient": lambda: broken_gradient(2, math.inf),
    "weights": broken_weights,
}


def test_a_pair_whose_loss_is_not_finite_is_named(ranks, tmp_path):
    flags = [*JOB, "--save", str(tmp_path), "--save-interval", "1"]
    for message, is_final, tracker in ranks(2)(train_with, "loss", flags):
        assert re.search(r"the loss of 1 pair is not finite:\n  .*train\.jsonl, line \d+: loss nan", message), message
        assert not is_final, "a launcher may try again"
        assert tracker == "1"


@pytest.mark.parametrize(("fault", "step"), [("first gradient", 1), ("gradient", 2)])
def test_a_gradient_that_is_not_finite_is_not_applied(ranks, tmp_path, fault, step):
    """Also in the first step, at which Megatron's own default does not look; and the same command goes on."""
    flags = [*JOB, "--save", str(tmp_path), "--save-interval", "1"]
    messages, _, trackers = zip(*ranks(2)(train_with, fault, flags), strict=True)
    expected = rf"gradient of step {step} is not finite.*found \w+ in local grad norm.*train\.jsonl, line"
    assert re.search(expected, messages[0], re.DOTALL), messages
    assert set(trackers) == {"" if step == 1 else "1"}
    resumed = last_stage(ranks(2)(train, [*flags, "--load", str(tmp_path)]))
    assert [step["iteration"] for step in resumed.steps] == list(range(step, 4))
    assert all(math.isfinite(step["loss"]) for step in resumed.steps)


@pytest.mark.parametrize(
    ("flags", "blamed"), [("--lr 1e3", "--lr 1000. Lower it"), ("--lr 1e30", "--lr 1e+30. Lower it")]
)
def test_a_learning_rate_that_is_far_too_high_is_blamed(ranks, tmp_path, flags, blamed):
    """Whether the numbers stay finite or not: the step is named, and no launcher tries once more."""
    job = ["--num-layers", "1", "--train-iters", "4", "--save", str(tmp_path), "--save-interval", "4"]
    ((message, is_final, tracker),) = ranks(1)(train_with, "none", [*job, *flags.split()])
    assert re.search(r"step 2", message), message
    assert f"The likely cause is {blamed}" in message
    assert "once more" not in message
    assert is_final and not tracker


def test_weights_that_are_not_finite_are_not_written(ranks, tmp_path):
    flags = [*JOB, "--save", str(tmp_path), "--save-interval", "2"]
    for message, is_final, tracker in ranks(2)(train_with, "weights", flags):
        assert re.search(r"iter_0000002 is not written: weights are not finite:\n  rank 1: \S+", message), message
        assert not is_final
        assert tracker == ""


def broken_reference(flags, **overrides):
    """The job, with a model that answers NaN while the reference is scored."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.run import PreferenceRun

    class Faulty(PreferenceRun):
        def after_load(self, model):
            next(iter(model[0].parameters())).data.view(-1)[0:64] = math.nan
            super().after_load(model)

    try:
        run_job(flags, overrides, run_type=Faulty)
    except UserError as error:
        return str(error)
    return ""


def test_a_reference_that_is_not_finite_is_not_kept(ranks, tmp_path):
    messages = ranks(2)(broken_reference, [*JOB, "--save", str(tmp_path), "--save-interval", "5"])
    assert len(set(messages)) == 1
    assert re.search(r"conditional log-probs of \d+ answers? are not finite:\n  .*train\.jsonl, line", messages[0])
    assert not list(tmp_path.glob("cache/reference-*/*/shard-*")), "they were kept"


def train_with_a_broken_shift(flags, **overrides):
    """KTO, of which the policy's log-prob of one answer after another row's prompt is NaN in the second step: what is
    said on this rank."""
    from unittest import mock

    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training import run

    found = []

    def broken(scorer):
        score = passes_of(scorer)

        def scored(groups, pause):
            found.append(score(groups, pause))
            if len(found) == 2:
                found[1][3] = math.nan
            return found[-1]

        return scored

    passes_of = run.passes_of
    with mock.patch.object(run, "passes_of", broken):
        try:
            run_job(flags, overrides)
        except UserError as error:
            return str(error)
    return ""


def test_an_answer_that_breaks_a_whole_step_is_named_alone(ranks, tmp_path):
    """The others are not finite either, for what they share with it."""
    rows = [{"prompt": f"Question {row}", "completion": f" Answer {row}", "label": row % 2 > 0} for row in range(16)]
    data = write(tmp_path / "rows.jsonl", *rows)
    flags = ["--num-layers", "1", "--train-iters", "3", "--preference-loss", "kto", "--pair-cache-dir", str(tmp_path)]
    messages = ranks(2)(train_with_a_broken_shift, flags, pair_data=[str(data)], max_pairs=None)
    assert len(set(messages)) == 1
    row = r".*rows\.jsonl, line \d+"
    said = rf"^step 2: .* for the log-probs of 1 answer:\n  {row}, after the prompt of {row}: policy nan, reference -"
    assert re.search(said, messages[0])
    assert messages[0].count("rows.jsonl") == 2


def test_pairs_at_the_edges_train_to_finite_numbers(ranks, tmp_path):
    """Answers of one token, nearly identical ones, an answer of 8k tokens beside them; identical ones are dropped."""
    long, some = " word" * 4800, " word" * 400
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": long, "rejected": " no"},
        {"prompt": "Q", "chosen": " yes" + some, "rejected": " no" + some},
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
    ]
    data = write(tmp_path / "edges.jsonl", *rows)
    flags = [
        "--num-layers",
        "1",
        "--train-iters",
        "2",
        "--pair-data",
        data,
    ]
    outcomes = ranks(1)(train, flags, seq_length=20480, pairs_per_step=3, pair_cache_dir=str(tmp_path / "cache"))
    steps = last_stage(outcomes).steps
    assert [step["iteration"] for step in steps] == [1, 2]
    assert all(math.isfinite(value) for step in steps for value in step.values())
    (meta,) = tmp_path.glob("cache/*/meta.json")
    report = json.loads(meta.read_text())["report"]
    assert "IDENTICAL_RESPONSES" in json.dumps(report), "the dropped pair is counted by its reason"
    lengths = np.fromfile(meta.with_name("lengths.bin"), "<i4").reshape(-1, 3)
    assert len(lengths) == 3
    assert lengths[:, 1:].min() == 2, "a token and the end"
    assert lengths[:, 1:].max() > 8192
