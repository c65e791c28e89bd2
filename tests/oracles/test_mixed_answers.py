"""Losses of labelled answers on rows of every kind, by their papers: a step of ours and Hugging Face's in fp64.

TRL's trainers read labelled answers alone (`test_trl_answers`). Here pairs, labelled answers, ranked answers and rows
with one prompt are mixed, and everything but the model is written out: which answers there are, after which prompts
they are scored once more, what is compared with what, and what each counts.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import FAMILIES, build_model, response_log_probs, to_hugging_face
from tests.harness.jobs import DATA, TINY_MODEL
from tests.harness.recording import Step, merge, train_and_record

pytest.importorskip("transformers", reason="the oracle is its model")

BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 0.3, 1.5, 0.75
MODEL = TINY_MODEL | FAMILIES["llama"]

#: Loss, ranks, layout and what a step's mean is over.
CASES = {
    "kto": ("kto", 1, [], "groups"),
    "kto DP2, over pairs": ("kto", 2, [], "pairs"),
    "bco": ("bco", 1, [], "groups"),
    "bco PP2, over pairs": ("bco", 2, ["--pipeline-model-parallel-size", "2"], "pairs"),
}


def files() -> dict[str, list[dict[str, Any]]]:
    """Two pairs, four labelled answers of which two have one prompt, a pair; and a row of three ranked answers."""
    examples = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[:8]]
    pairs = [{name: each[name] for name in ("prompt", "chosen", "rejected")} for each in examples]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs[2:], ["chosen", "rejected", "rejected", "chosen"], strict=False)
    ]
    labelled[2]["prompt"] = labelled[1]["prompt"]
    answers = [pairs[6]["chosen"], pairs[6]["rejected"], pairs[0]["rejected"]]
    ranked = {"prompt": pairs[6]["prompt"], "responses": answers, "scores": [2, 3, 1]}
    return {"rows.jsonl": [*pairs[:2], *labelled, pairs[7]], "ranked.jsonl": [ranked]}


class Answer(NamedTuple):
    """An answer that a loss reads."""

    tokens: np.ndarray
    is_desirable: bool
    share: float
    """In the step's mean."""


class Row(NamedTuple):
    """A row of the data."""

    prompt: np.ndarray
    answers: list[Answer]


def read(store: PairStore, over: str) -> list[Row]:
    """The store's rows, each with both answers of each of its pairs, or the one that has a label."""
    found = []
    origins = list(zip(store.source.tolist(), store.row.tolist(), strict=True))
    counted = len(store) if over == "pairs" else len(set(origins))
    for _, places in itertools.groupby(range(len(store)), key=origins.__getitem__):
        pairs = [(store.pair(place), int(store.label[place])) for place in places]
        share = 1 / counted if over == "pairs" else 1 / counted / len(pairs)
        answers = []
        for pair, label in pairs:
            if label >= 0:
                answers.append(Answer(pair.chosen, label == 1, share))
            else:
                answers += [Answer(pair.chosen, True, share / 2), Answer(pair.rejected, False, share / 2)]
        found.append(Row(pairs[0][0].prompt, answers))
    return found


def other_prompt(found: list[Row], place: int) -> np.ndarray:
    """Of the nearest row before it with another prompt, or else of the first one after it."""
    nearest = [*reversed(found[:place]), *found[place:]]
    return next(row.prompt for row in nearest if not np.array_equal(row.prompt, found[place].prompt))


def log_ratios(policy: Any, reference: Any, asked: list[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Delta of each answer after its prompt, in nats, with the policy's graph."""
    ratios = []
    for prompt, answer in asked:
        with torch.no_grad():
            under_reference = response_log_probs(reference, prompt, answer).sum()
        ratios.append(response_log_probs(policy, prompt, answer).sum() - under_reference)
    return torch.stack(ratios)


@torch.no_grad()
def mean_entropy(model: Any, prompt: np.ndarray, answer: np.ndarray) -> float:
    """Of the model's next token, in nats, over the tokens of an answer."""
    tokens = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    log_probs = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(-(log_probs.exp() * log_probs).sum(-1).mean())


@dataclass(frozen=True)
class Expected:
    """What a step is to be."""

    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]


def expected(loss: str, policy: Any, reference: Any, found: list[Row]) -> Expected:
    """KTO, arXiv 2402.01306, eq. 7, or BCO, arXiv 2404.04656, of all rows."""
    answers = [answer for row in found for answer in row.answers]
    rewards = BETA * log_ratios(policy, reference, [(row.prompt, each.tokens) for row in found for each in row.answers])
    is_desirable = torch.tensor([each.is_desirable for each in answers])
    share = torch.tensor([each.share for each in answers], dtype=torch.float64)
    weight = torch.where(is_desirable, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT)
    if loss == "kto":
        asked = [(other_prompt(found, place), each.tokens) for place, row in enumerate(found) for each in row.answers]
        with torch.no_grad():
            z = max(0.0, float(log_ratios(policy, reference, asked).mean()))
        from_it = rewards - BETA * z
        losses = torch.where(is_desirable, 1 - torch.sigmoid(from_it), 1 - torch.sigmoid(-from_it))
        told = {"kl": z}
    else:
        delta = rewards.detach().mean()
        from_it = rewards - delta
        losses = -torch.where(is_desirable, torch.sigmoid(from_it), torch.sigmoid(-from_it)).log()
        told = {"delta": float(delta)}
    (whole := (share * weight * losses).sum()).backward()
    right = torch.where(is_desirable, from_it, -from_it) > 0

    entropy = torch.tensor([mean_entropy(policy, row.prompt, each.tokens) for row in found for each in row.answers])

    def mean_of(values: Tensor, some: Tensor) -> float:
        return float((values.detach() * share)[some].sum() / share[some].sum())

    metrics = {
        "loss": float(whole.detach()),
        "rewards/accuracies": mean_of(right.double(), torch.ones_like(right)),
        "rewards/chosen": mean_of(rewards, is_desirable),
        "rewards/rejected": mean_of(rewards, ~is_desirable),
        "entropy/chosen": mean_of(entropy, is_desirable),
        "entropy/rejected": mean_of(entropy, ~is_desirable),
        **told,
    }
    return Expected(metrics, {name: weight.grad.numpy() for name, weight in policy.named_parameters()})


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def steps(request, ranks, tmp_path_factory) -> list[tuple[Step, Expected]]:
    """The second and the third step of a job, each of whose steps has all rows."""
    loss, world_size, layout, over = request.param
    directory: Path = tmp_path_factory.mktemp("mixed")
    for name, rows in files().items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    job = {"pairs_per_step": 8, "train_iters": 3, "init_method_std": 0.2, "lr": 3e-3, "max_pairs": None}
    job |= {"pair_data": [str(directory / name) for name in files()], "pair_cache_dir": str(directory / "cache")}
    weights = ["--desirable-weight", str(DESIRABLE_WEIGHT), "--undesirable-weight", str(UNDESIRABLE_WEIGHT)]
    flags = ["--preference-loss", loss, "--beta", str(BETA), *weights, "--pairs-from", "all", "--log-entropy", *layout]
    flags += ["--mean-over", "pairs"] if over == "pairs" else []
    found = merge(ranks(world_size)(train_and_record, flags, **MODEL, **job)).steps
    (meta,) = (directory / "cache").glob("*/meta.json")
    read_rows = read(PairStore.open(meta.parent), over)
    assert [len(row.answers) for row in read_rows] == [2, 2, 1, 1, 1, 1, 2, 6]
    reference = build_model("llama", MODEL, found[0].weights).double()
    return [
        (step, expected(loss, build_model("llama", MODEL, step.weights).double(), reference, read_rows))
        for step in found[1:]
    ]


def test_metrics(steps):
    for step, wanted in steps:
        for name, value in wanted.metrics.items():
            assert step.metrics[name] == pytest.approx(value, rel=1e-4, abs=5e-5), name
        assert max(map(abs, (wanted.metrics.get(name, 0.0) for name in ("kl", "delta")))) > 0.01, "it is nearly 0"


def test_gradient_of_every_parameter(steps):
    for step, wanted in steps:
        found = to_hugging_face("llama", step.gradients, MODEL)
        assert found.keys() == wanted.gradients.keys()
        for name, gradient in wanted.gradients.items():
            assert np.abs(found[name] - gradient).max() <= 2e-4 * np.abs(gradient).max(), name
