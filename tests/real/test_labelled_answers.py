"""KTO on the real model, on rows of one answer and a label: the run's numbers by transformers."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tests.harness.huggingface import token_log_probs
from tests.harness.jobs import last_stage
from tests.harness.tiny_models import load_model
from tests.real.jobs import real_job
from tests.real.test_run import GATE, LOG_PROB

BETA = 0.1
WEIGHT = 2.0
RUN = {"preference_loss": "kto", "beta": BETA, "pairs_per_step": 4, "train_iters": 2, "lr": 1e-5}


@pytest.fixture(scope="module")
def labels(pairs) -> list[bool]:
    return [place % 4 > 0 for place in range(len(pairs))]


@pytest.fixture(scope="module")
def run(ranks, job, rows, labels, tmp_path_factory):
    """Two steps of four labelled answers, the chosen or the rejected one of each pair, and an evaluation of all."""
    directory = tmp_path_factory.mktemp("labels")
    path = directory / "rows.jsonl"
    made = [
        {"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label}
        for row, label in zip(rows, labels, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    flags = ["--pipeline-model-parallel-size", "2", "--desirable-weight", str(WEIGHT)]
    flags += ["--save", str(directory / "run"), "--save-interval", "2", "--save-hf", str(directory / "export")]
    data = {"pair_data": [str(path)], "eval_pair_data": [str(path)], "pair_cache_dir": str(directory / "cache")}
    return last_stage(ranks(2)(real_job, flags, **job | RUN | data)), directory / "export"


def test_it_starts_as_its_reference(run):
    step = run[0]
    assert step.gate.log_ratio <= GATE and step.gate.loss <= 1e-6 and step.metrics[0]["kl"] <= LOG_PROB


def test_the_exported_model_has_the_metrics_of_the_evaluation(run, model, pairs, labels):
    """z is the mean over the answers, each after the prompt of the row before it; the first after the second's."""
    step, export = run
    policy = load_model(export)
    answers = [pair.answers[0 if label else 1] for pair, label in zip(pairs, labels, strict=True)]
    prompts = [pair.prompt for pair in pairs]
    assert all(a != b for a, b in itertools.pairwise(prompts))
    others = [prompts[1], *prompts[:-1]]

    def log_ratios(after: list[list[int]]) -> np.ndarray:
        dialogues = [(np.array(prompt), np.array(answer)) for prompt, answer in zip(after, answers, strict=True)]
        of_both = [[token_log_probs(each, *dialogue).sum() for dialogue in dialogues] for each in (policy, model)]
        return np.subtract(*of_both)

    found, desirable = step.evaluation, np.array(labels)
    z, rewards = max(0.0, log_ratios(others).mean()), BETA * log_ratios(prompts)
    assert z > 0.05 and np.abs(rewards).max() > 0.1, "steps that would not be missed compare nothing"
    signed = np.where(desirable, 1, -1) * (rewards - BETA * z)
    expected = {
        "loss": (np.where(desirable, WEIGHT, 1.0) / (1 + np.exp(signed))).mean(),
        "kl": z,
        "rewards/chosen": rewards[desirable].mean(),
        "rewards/rejected": rewards[~desirable].mean(),
        "rewards/accuracies": (signed > 0).mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0, abs=LOG_PROB), name
