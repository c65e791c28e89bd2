"""A B-DPO run of two steps on the real model: its numbers by plain transformers, its resume, its export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import token_log_probs
from tests.harness.jobs import last_stage, scores_in
from tests.harness.tiny_models import load_model
from tests.real.conftest import PAIRS
from tests.real.jobs import RealStep, real_job

BETA = 0.1
PP2 = ["--pipeline-model-parallel-size", "2"]
RUN = {
    "preference_loss": "bdpo",
    "beta": BETA,
    "bdpo_temperature": 1.0,
    "pairs_per_step": 4,
    "train_iters": 2,
    "lr": 1e-5,
}

# Nats: sums of some ten fp32 log-probs of up to 20, each rounded to 2e-6, after 30 layers of either. Seen: 5e-5.
LOG_PROB = 2e-4
# Nats per token, between the packs of a step and those of the scoring. Seen: 0; the gate itself allows 5e-5.
GATE = 1e-6


@dataclass(frozen=True)
class Run:
    step: RealStep
    checkpoint: Path
    export: Path


@pytest.fixture(scope="module")
def whole(ranks, job, tmp_path_factory) -> Run:
    """Undisturbed, the embedding on both stages, with an evaluation of the eight pairs at its end."""
    directory = tmp_path_factory.mktemp("whole")
    save, export = directory / "run", directory / "export"
    flags = [*PP2, "--save", str(save), "--save-interval", "2", "--save-hf", str(export)]
    told = ranks(2)(real_job, flags, eval_pair_data=[str(PAIRS)], **job | RUN)
    return Run(last_stage(told), save / "iter_0000002", export)


# Data and reference ---------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_chat_template(whole, cache, pairs, tokenizer):
    """System messages, dialogues of several turns, the mark at an answer's end; and the empty user turn."""
    (meta,) = cache.glob("*/meta.json")
    store = PairStore.open(meta.parent)
    for row, expected in enumerate(pairs):
        found = store.pair(row)
        assert found.prompt.tolist() == expected.prompt
        assert (found.chosen.tolist(), found.rejected.tolist()) == expected.answers
    assert store.empty_prompt.tolist() == empty_prompt(tokenizer)


def empty_prompt(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False
    )


@dataclass(frozen=True)
class Expected:
    """Each [P, 2], chosen and rejected, by plain transformers; summed in fp64."""

    reference: np.ndarray
    unconditional: np.ndarray
    policy: np.ndarray
    tokens: np.ndarray

    @property
    def information(self) -> np.ndarray:
        """Nats per token."""
        return (self.reference - self.unconditional) / self.tokens

    @property
    def weights(self) -> np.ndarray:
        """2 softmax(-I / tau), tau = 1."""
        powers = np.exp(-self.information)
        return 2 * powers / powers.sum(axis=1, keepdims=True)

    @property
    def scale(self) -> np.ndarray:
        """[P]"""
        return np.sqrt(2) / np.linalg.norm(self.weights, axis=1)

    @property
    def rewards(self) -> np.ndarray:
        return BETA * (self.policy - self.reference)

    @property
    def loss(self) -> np.ndarray:
        """[P]: -log sigmoid(beta s (w_w Delta_w - w_l Delta_l))."""
        weighted = self.weights * self.rewards
        return np.logaddexp(0, -self.scale * (weighted[:, 0] - weighted[:, 1]))


@pytest.fixture(scope="module")
def expected(whole, model, pairs, tokenizer) -> Expected:
    """The policy is the exported model, read by transformers."""
    empty = empty_prompt(tokenizer)
    return Expected(
        log_probs(model, [(pair.prompt, pair.answers) for pair in pairs]),
        log_probs(model, [(empty, pair.answers) for pair in pairs]),
        log_probs(load_model(whole.export), [(pair.prompt, pair.answers) for pair in pairs]),
        np.array([[len(answer) for answer in pair.answers] for pair in pairs]),
    )


def log_probs(model: Any, dialogues: list[tuple[list[int], tuple[list[int], list[int]]]]) -> np.ndarray:
    """[P, 2] of both answers of each prompt."""
    return np.array(
        [
            [token_log_probs(model, np.array(prompt), np.array(answer)).sum() for answer in answers]
            for prompt, answers in dialogues
        ]
    )


def test_reference_and_comprehension_of_every_pair(whole, cache, expected):
    scores = scores_in(cache)
    assert scores.tokens.tolist() == expected.tokens.tolist()
    assert scores.conditional == pytest.approx(expected.reference, rel=0, abs=LOG_PROB)
    assert scores.unconditional == pytest.approx(expected.unconditional, rel=0, abs=LOG_PROB)
    imbalance = expected.information[:, 0] - expected.information[:, 1]
    assert np.abs(imbalance).max() > 1, "on a real model the prompt tells more about one answer than about the other"
    assert expected.weights.min() < 0.5 and expected.weights.max() > 1.5


# The step -------------------------------------------------------------------------------------------------------------


def test_the_policy_starts_as_its_reference(whole):
    assert whole.step.metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert whole.step.gate.log_ratio <= GATE and whole.step.gate.loss <= 1e-6


def test_the_exported_model_has_the_metrics_of_the_run(whole, expected):
    """Loss, rewards, log-probs, comprehension, weights: means over the pairs, after the last step."""
    means = {"loss": expected.loss.mean(), "scale": expected.scale.mean()}
    for name, values in {
        "logps": expected.policy,
        "rewards": expected.rewards,
        "comprehension": expected.information,
        "weights": expected.weights,
    }.items():
        means |= {f"{name}/chosen": values[:, 0].mean(), f"{name}/rejected": values[:, 1].mean()}
    margins = expected.rewards[:, 0] - expected.rewards[:, 1]
    means |= {"rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).mean()}
    assert margins.mean() > 0.3, "steps that would not be missed compare nothing"
    for name, value in means.items():
        tolerance = LOG_PROB if name.startswith("logps") else BETA * LOG_PROB
        assert whole.step.evaluation[name] == pytest.approx(value, rel=0, abs=tolerance), name


def test_the_exported_tokenizer_is_the_models(whole, rows, tokenizer):
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(whole.export)
    for row in rows:
        dialogue = row["prompt"] + row["chosen"]
        assert exported.apply_chat_template(dialogue) == tokenizer.apply_chat_template(dialogue)


# Resume ---------------------------------------------------------------------------------------------------------------


def test_one_step_and_another_are_two_steps(ranks, job, whole, tmp_path):
    """Weights and the optimizer's state to the bit, and every metric of the second step."""
    flags = [*PP2, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    (first,) = last_stage(ranks(2)(real_job, [*flags, "--exit-interval", "1"], **job | RUN)).metrics
    resumed = last_stage(ranks(2)(real_job, flags, **job | RUN))
    assert resumed.gate is None, "the policy is not its reference any more"
    assert [without_times(step) for step in (first, *resumed.metrics)] == [
        without_times(step) for step in whole.step.metrics
    ]
    found, expected = (stored_bytes(path) for path in (tmp_path / "iter_0000002", whole.checkpoint))
    assert found.keys() == expected.keys() and "optimizer.state.exp_avg.embedding.word_embeddings.weight" in {
        name for name, _ in expected
    }
    for item, content in expected.items():
        assert np.array_equal(found[item], content), item


def without_times(step: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in step.items() if not name.startswith("throughput")}


def stored_bytes(checkpoint: Path) -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
    """(Name, place of the piece) -> its bytes: weights, optimizer, random state; not Megatron's arguments."""
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    files = {each.relative_path: np.memmap(checkpoint / each.relative_path, mode="r") for each in stored.values()}
    return {
        (index.fqn, tuple(index.offset or ())): files[at.relative_path][at.offset : at.offset + at.length]
        for index, at in stored.items()
        if not index.fqn.startswith("common_state")
    }
