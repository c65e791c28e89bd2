"""TRL's DPOTrainer takes one step from the real weights on eight real pairs: so do we, split by heads or by layers.

TRL gets the model's directory and the messages; the chat template, tokens, loss, gradients and the step are its own.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass

import numpy as np
import pytest

from tests.harness.huggingface import Tensors, renamed
from tests.harness.jobs import assemble, last_stage
from tests.harness.tiny_models import load_model
from tests.harness.trl_trainer import TrlStep, trl_step
from tests.real.conftest import PAIRS
from tests.real.jobs import RealStep, real_job

pytest.importorskip("trl", reason="the oracle is TRL's DPOTrainer")

# Of transformers, about its own names that TRL uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BETA, LEARNING_RATE = 0.1, 3e-3
#: Plain gradient descent, so that the weights after the step are the gradients' to answer for.
STEP = {
    "preference_loss": "dpo",
    "beta": BETA,
    "pairs_per_step": 8,
    "train_iters": 1,
    "eval_pair_data": [str(PAIRS)],
    "optimizer": "sgd",
    "sgd_momentum": 0.0,
    "weight_decay": 0.0,
    "lr": LEARNING_RATE,
}

#: Nine heads in three groups over three ranks; and the embedding, which is the output layer too, on two stages.
LAYOUTS = {
    "TP3 SP": (3, "--tensor-model-parallel-size 3 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
}

# fp32 sums in another order, in each of 30 layers and back: relative to a tensor's largest entry. Seen: 3e-5.
GRADIENT = 3e-4
# Nats: sums of some ten log-probs of up to 20, each rounded to 2e-6, before the step and after it. Seen: 2e-5.
LOG_PROB = 2e-4
# Nats per token, between the packs of a step and those of the scoring. Seen: 2e-6; the gate itself allows 5e-5.
GATE = 1e-5


@dataclass(frozen=True)
class Case:
    step: RealStep
    gradients: Tensors
    """Under Hugging Face's names."""


@pytest.fixture(scope="module")
def expected(smollm2, rows, tokenizer, tmp_path_factory) -> TrlStep:
    step = trl_step(
        load_model(smollm2),
        load_model(smollm2),
        rows,
        tokenizer,
        tmp_path_factory.mktemp("trl"),
        batch=1,  # no padding
        evaluate=True,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
    )
    gc.collect()  # two models and a trainer, in a cycle
    return step


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def case(request, ranks, smollm2, job) -> Case:
    world_size, flags = request.param
    told = ranks(world_size)(real_job, flags.split(), gradients=True, **job | STEP)
    config = json.loads((smollm2 / "config.json").read_text())
    return Case(last_stage(told), renamed(assemble(each.gradients for each in told), config))


def test_the_policy_starts_as_its_reference(case, expected):
    """ln 2 on both sides; the gate of the first step is far within what it allows."""
    (metrics,) = case.step.metrics
    assert metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=1e-6)
    assert case.step.gate.log_ratio <= GATE and case.step.gate.loss <= 1e-6


def test_gradient_of_every_parameter(case, expected):
    assert case.gradients.keys() == expected.gradients.keys()
    assert "lm_head.weight" not in expected.gradients, "tied: one gradient, of both uses"
    for name, theirs in expected.gradients.items():
        scale = np.abs(theirs).max()
        assert scale > 1e-3, f"{name}: a gradient that is nearly zero compares nothing"
        assert np.abs(case.gradients[name] - theirs).max() <= GRADIENT * scale, name


def test_loss_and_rewards_after_the_step(case, expected):
    found, theirs = case.step.evaluation, expected.after
    assert abs(theirs["rewards/margins"]) > 0.3, "a step that would not be missed compares nothing"
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found[name] == pytest.approx(theirs[name], rel=0, abs=BETA * LOG_PROB), name
    for name in ("logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(theirs[name], rel=0, abs=LOG_PROB), name
