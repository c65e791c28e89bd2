"""TRL's KTOTrainer takes the same step on the same labelled answers: loss, KL estimate, rewards and every gradient.

Our side is the second step of a job, each of whose steps has all rows; see ``test_trl`` for the rest.

TRL puts each answer of a batch after the prompt that follows it, the last one after the first. Ours follow the prompt
before it in the data, the first one that after it. So TRL gets the rows in reverse, and the last row has the prompt of
the second: then both make the same mismatched answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import FAMILIES, VOCABULARY, build_model, to_hugging_face
from tests.harness.jobs import DATA, TINY_MODEL
from tests.harness.recording import Step, merge, train_and_record
from tests.harness.trl_trainer import TrlStep, apart, token_id_tokenizer, trl_kto_step

pytest.importorskip("trl", reason="the oracle is TRL's KTOTrainer")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ANSWERS = 12
BETA = 0.3
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}

TP2_PP2 = (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"])
CP2 = (2, ["--context-parallel-size", "2"])

#: Loss, ranks and layout.
CASES = {
    "kto": ("kto", (1, [])),
    "kto TP2 PP2": ("kto", TP2_PP2),
    "kto CP2": ("kto", CP2),
    "apo_zero_unpaired": ("apo_zero_unpaired", (1, [])),
}


@dataclass(frozen=True)
class Case:
    """The step as we take it, and as TRL does. Gradients are under Hugging Face's names."""

    loss: str
    step: Step
    gradients: dict[str, np.ndarray]
    expected: TrlStep
    """In fp64."""
    in_single: TrlStep
    """In fp32."""


def rows() -> list[dict[str, Any]]:
    """One answer of each of the example's pairs."""
    pairs = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[:ANSWERS]]
    pairs[-1]["prompt"] = pairs[1]["prompt"]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs, ["chosen", "rejected", "chosen"] * ANSWERS, strict=False)
    ]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, ranks, tmp_path_factory) -> Case:
    loss, (world_size, layout) = request.param
    directory = tmp_path_factory.mktemp("trl")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
    model = TINY_MODEL | FAMILIES["llama"]
    job = {"pairs_per_step": ANSWERS, "train_iters": 2, "init_method_std": 0.2, "lr": 1e-2, "max_pairs": None}
    job |= {"pair_data": [str(directory / "rows.jsonl")], "pair_cache_dir": str(directory / "cache")}
    options = [part for name, value in WEIGHTS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags = ["--preference-loss", loss, "--beta", str(BETA), *options, *layout]
    steps = merge(ranks(world_size)(train_and_record, flags, **model, **job)).steps
    (meta,) = (directory / "cache").glob("*/meta.json")
    expected, in_single = (
        trl_kto_step(
            build_model("llama", model, steps[1].weights),
            build_model("llama", model, steps[0].weights),
            answers_as_text(PairStore.open(meta.parent))[::-1],
            token_id_tokenizer(VOCABULARY),
            directory,
            beta=BETA,
            loss_type=loss,
            double=double,
            **WEIGHTS,
        )
        for double in (True, False)
    )
    return Case(loss, steps[1], to_hugging_face("llama", steps[1].gradients, model), expected, in_single)


def answers_as_text(store: PairStore) -> list[dict[str, Any]]:
    """The rows as texts whose words are token ids."""

    def text(tokens: np.ndarray) -> str:
        return "".join(f"<{token}>" for token in tokens)

    pairs = [store.pair(row) for row in range(len(store))]
    return [
        {"prompt": text(pair.prompt), "completion": text(pair.chosen), "label": bool(label)}
        for pair, label in zip(pairs, store.label, strict=True)
    ]


def test_loss_kl_and_rewards(case):
    metrics, expected = case.step.metrics, case.expected.metrics
    if case.loss == "kto":
        assert expected["kl"] > 0.1, "else it would compare nothing"
        assert metrics["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-5, abs=3e-5), name


def test_gradient_of_every_parameter(case, request):
    """See ``test_trl`` for the limits."""
    for name, expected in case.expected.gradients.items():
        assert np.abs(expected).max() > 1e-3, f"{name}: a gradient that is nearly zero compares nothing"
    found = [apart(gradients, case.expected.gradients) for gradients in (case.gradients, case.in_single.gradients)]
    print(f"{request.node.name}: from TRL in fp64: ours {found[0]}, TRL in fp32 {found[1]}")
    assert found[0][0] <= 2e-5 and found[1][0] <= 1e-4
