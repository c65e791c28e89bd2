"""Answers of several turns: sums over the assistant's tokens alone, and their gradients, are plain transformers'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bdpo.data.store import PairStore
from megatron_bdpo.training.reference.cache import Scores
from tests.harness.huggingface import build_model, response_log_probs, to_hugging_face
from tests.harness.jobs import TINY_MODEL, scores_in
from tests.harness.recording import Step, merge, train_and_record

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

BETA = 0.1
PAIRS = 8
LAYOUTS = {
    "1 rank": (1, []),
    "unshared": (1, ["--no-share-prompts"]),
    "TP2 SP PP2": (
        4,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"],
    ),
    "CP2": (2, ["--context-parallel-size", "2"]),
}


def dialogue(turns: list[str]) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def rows() -> list[dict[str, str]]:
    """The chosen dialogue goes on for one to three turns after the first, the rejected one for none or two."""
    words = [
        "yes, of course",
        "a lock is a thing of metal",
        "no",
        "what is the weather",
        "please tell me more",
        "maybe",
    ]
    found = []
    for i in range(PAIRS):
        said = [f"{words[(i + j) % 6]} and {words[(2 * i + j) % 6]}" for j in range(8)]
        chosen, rejected = 2 * (1 + i % 3) + 2, 2 + 2 * (i % 2)
        found.append(
            {
                "chosen": dialogue([words[i % 6], *said[: chosen - 1]]),
                "rejected": dialogue([words[i % 6], "I do not know", *said[3 : 3 + rejected - 2]]),
            }
        )
    return found


@dataclass(frozen=True)
class Case:
    step: Step[dict[str, np.ndarray]]
    scores: Scores
    store: PairStore
    model: Any

    def sums(self, row: int, prompt: np.ndarray) -> list[torch.Tensor]:
        """Of the scored tokens of both answers, by Hugging Face, with their graph."""
        pair = self.store.pair(row)
        sums = []
        for answer, scored in zip((pair.chosen, pair.rejected), pair.scored, strict=True):
            tokens = response_log_probs(self.model, prompt, answer)
            sums.append((tokens if scored is None else tokens[torch.from_numpy(scored)]).sum())
        return sums


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory) -> Any:
    def once(layout: str, loss: str) -> Case:
        world_size, flags = LAYOUTS[layout]
        directory = tmp_path_factory.mktemp("turns")
        data = directory / "dialogues.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        job = {"pair_data": [str(data)], "max_pairs": PAIRS, "pairs_per_step": PAIRS, "train_iters": 1}
        job |= {"pair_cache_dir": str(directory / "cache"), "init_method_std": 0.1}
        flags = [*flags, "--preference-loss", loss, "--beta", str(BETA)]
        (step,) = merge(ranks(world_size)(train_and_record, flags, **job)).steps
        (meta,) = (directory / "cache").glob("*/meta.json")
        model = build_model("llama", TINY_MODEL, step.weights)
        return Case(step, scores_in(directory / "cache"), PairStore.open(meta.parent), model)

    return once


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, run) -> Case:
    return run(request.param, "bdpo")


def test_answers_hold_turns_of_others(case):
    scored, whole = case.store.scored, case.store.lengths[:, 1:]
    assert (scored[:, 0] < whole[:, 0]).all() and (scored[:, 1] < whole[:, 1]).any()
    assert (scored[:, 1] == whole[:, 1]).any()
    assert (scored > 0).all()


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_sums_are_over_what_the_assistant_says(case, kind):
    for row, values in enumerate(getattr(case.scores, kind)):
        prompt = case.store.pair(row).prompt if kind == "conditional" else case.store.unconditional_prompt(row)
        expected = [float(each) for each in case.sums(row, prompt)]
        assert values == pytest.approx(expected, rel=1e-6), f"pair {row}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(run, layout):
    case = run(layout, "dpo")
    case.model.zero_grad()
    losses = []
    for row in range(PAIRS):
        chosen, rejected = case.sums(row, case.store.pair(row).prompt)
        reference = case.scores.conditional[row]
        margin = (chosen - reference[0]) - (rejected - reference[1])
        losses.append(-torch.nn.functional.logsigmoid(BETA * margin))
    torch.stack(losses).mean().backward()
    found = to_hugging_face("llama", case.step.gradients, TINY_MODEL)
    for name, parameter in case.model.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(found[name] - expected).max() <= 1e-4 * np.abs(expected).max(), name
