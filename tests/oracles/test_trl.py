"""TRL's DPOTrainer takes the same step on the same pairs: loss, rewards and the gradient of every parameter.

Our side is the second step of a job, so that its policy has moved away from its reference. TRL gets the weights from
before that step as its model, the initial ones as its reference, and the step's pairs; tokenising, collating, loss and
backward are its own. It takes the step in fp64, which ours is compared with, and in fp32 as it would by itself.

    python -m pytest -rP tests/oracles | grep "TRL in fp64"     how far both are from it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import FAMILIES, VOCABULARY, build_model, to_hugging_face
from tests.harness.in_double import SumsInDouble
from tests.harness.jobs import TINY_MODEL
from tests.harness.recording import Step, merge, train_and_record
from tests.harness.trl_trainer import TrlStep, apart, token_id_tokenizer, trl_step

pytest.importorskip("trl", reason="the oracle is TRL's DPOTrainer")

PAIRS = 12  # of each of the two steps: other pairs, so that some margins are negative

BETA = 0.3  # margins of some units: hinge has pairs on both sides of its corner

# Of transformers, about its own names that TRL uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@dataclass(frozen=True)
class Loss:
    """A loss by our flags and by TRL's settings."""

    flags: list[str]
    trl: dict[str, Any]
    batch: int = PAIRS
    """Pairs that TRL sees at a time; it accumulates gradients over the step's batches."""
    same_rewards: bool = True
    """TRL logs beta Delta whatever the loss makes of the log-ratios."""
    least: float = 1e-3
    """Of the largest entry of each gradient, where comparing says something."""


LOSSES = {
    "dpo": Loss(["--preference-loss", "dpo"], {"loss_type": ["sigmoid"]}),
    # TRL's sigmoid reads no label smoothing. Its AOT does, and on a batch of one pair, with none to sort, it is cDPO.
    "cdpo": Loss(
        ["--preference-loss", "dpo", "--label-smoothing", "0.2"],
        {"loss_type": ["aot"], "label_smoothing": 0.2},
        batch=1,
    ),
    "ipo": Loss(["--preference-loss", "ipo"], {"loss_type": ["ipo"]}),
    "hinge": Loss(["--preference-loss", "hinge"], {"loss_type": ["hinge"]}),
    "ld": Loss(["--preference-loss", "dpo", "--ld-alpha", "0.4"], {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
    "robust": Loss(
        ["--preference-loss", "robust", "--label-smoothing", "0.2"], {"loss_type": ["robust"], "label_smoothing": 0.2}
    ),
}

#: The others of DPOTrainer that have one name here and there, with TRL's own defaults; `sft` is another mean there.
NAMES = ("aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair", "discopop", "nca_pair", "sigmoid_norm", "sppo_hard")
LOSSES |= {
    name: Loss(["--preference-loss", name], {"loss_type": [name]}, same_rewards=name != "sigmoid_norm")
    for name in NAMES
}
LOSSES["exo_pair"] = Loss(["--preference-loss", "exo_pair"], {"loss_type": ["exo_pair"], "label_smoothing": 1e-3})
WITH_OPTIONS = {
    "js_divergence": (["--f-divergence", "js_divergence"], {"f_divergence_type": "js_divergence"}),
    "ld_alpha": (["--ld-alpha", "0.3"], {"ld_alpha": 0.3}),
    "use_weighting": (["--use-weighting"], {"use_weighting": True}),
}
for name, (flags, settings) in WITH_OPTIONS.items():
    flags, settings = ["--preference-loss", "dpo", *flags], {"loss_type": ["sigmoid"], **settings}
    least = 1e-4 if name == "use_weighting" else 1e-3  # answers of random weights are unlikely, so they weigh little
    LOSSES[name] = Loss(flags, settings, same_rewards=name != "js_divergence", least=least)

TP2_PP2 = (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"])

CP2 = (2, ["--context-parallel-size", "2"])

# Every loss, every family with tied embeddings or without, and embeddings tied across stages.
CASES: dict[str, tuple[str, str, bool, tuple[int, list[str]]]] = {
    **{
        f"{loss} Llama": (loss, "llama", False, ((1, []), TP2_PP2, CP2)[place % 3]) for place, loss in enumerate(LOSSES)
    },
    "dpo Qwen2": ("dpo", "qwen2", False, (1, [])),
    "dpo Qwen3": ("dpo", "qwen3", False, (1, [])),
    "dpo Qwen2 tied": ("dpo", "qwen2", True, (1, [])),
    "dpo Qwen3 tied TP2 PP2": ("dpo", "qwen3", True, TP2_PP2),
    "ld Qwen3 TP2 PP2": ("ld", "qwen3", False, TP2_PP2),
}

# Ours are sums in fp64, of up to some thousand nats, of log-probs of tokens that are rounded to fp32.
LOG_RATIO = 1e-4
# Ours, in fp32, from TRL's in fp64, relative to the largest entry of a gradient. Seen: 1.0e-5.
GRADIENT = 2e-5
# TRL's in fp32: it sums log-probs in fp32, where one unit in the last place of a thousand nats is 1e-4. Seen: 2.3e-5.
TRL_ROUNDING = 1e-4


@dataclass(frozen=True)
class Case:
    """The step as we take it, and as TRL does. Gradients are under Hugging Face's names."""

    loss: Loss
    step: Step
    gradients: dict[str, np.ndarray]
    expected: TrlStep
    """In fp64."""
    in_single: TrlStep
    """In fp32."""


@dataclass(frozen=True)
class Job:
    """A job of ours whose second step TRL can take too."""

    loss: Loss
    family: str
    model: dict[str, Any]
    steps: list[Step]
    directory: Path

    def trl(self, *, double: bool) -> TrlStep:
        """TRL's."""
        (meta,) = self.directory.glob("*/meta.json")
        return trl_step(
            build_model(self.family, self.model, self.steps[1].weights),
            build_model(self.family, self.model, self.steps[0].weights),
            pairs_as_text(PairStore.open(meta.parent), list(self.steps[1].tokens)),
            token_id_tokenizer(VOCABULARY),
            self.directory,
            batch=self.loss.batch,
            beta=BETA,
            double=double,
            **self.loss.trl,
        )

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """Ours."""
        return to_hugging_face(self.family, self.steps[1].gradients, self.model)


def job_of(case: str, ranks: Any, directory: Path) -> Job:
    """Initial weights are drawn wide, as in the comparison of log-probs."""
    name, family, tied, (world_size, layout) = CASES[case]
    model = TINY_MODEL | FAMILIES[family] | {"untie_embeddings_and_output_weights": not tied}
    job = {"max_pairs": 2 * PAIRS, "pairs_per_step": PAIRS, "train_iters": 2, "init_method_std": 0.2, "lr": 1e-2}
    flags = [*LOSSES[name].flags, "--beta", str(BETA), *layout]
    steps = merge(ranks(world_size)(train_and_record, flags, pair_cache_dir=str(directory), **model, **job)).steps
    return Job(LOSSES[name], family, model, steps, directory)


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def case(request, ranks, tmp_path_factory) -> Case:
    job = job_of(request.param, ranks, tmp_path_factory.mktemp("trl"))
    return Case(job.loss, job.steps[1], job.gradients, job.trl(double=True), job.trl(double=False))


def pairs_as_text(store: PairStore, rows: list[int]) -> list[dict[str, str]]:
    """The pairs as texts whose words are token ids."""

    def text(tokens: np.ndarray) -> str:
        return "".join(f"<{token}>" for token in tokens)

    pairs = [store.pair(row) for row in rows]
    return [{"prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected)} for p in pairs]


# Comparisons ---------------------------------------------------------------------------------------------------------


def test_loss_and_rewards(case):
    metrics, expected = case.step.metrics, case.expected.metrics
    if case.loss.trl["loss_type"] in (["sigmoid"], ["ipo"], ["hinge"], ["robust"]):
        assert 0 < expected["rewards/accuracies"] < 1, "some margins shall be positive and some negative"
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    for name in ("loss", *(rewards if case.loss.same_rewards else ())):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6, abs=BETA * LOG_RATIO), name


def test_gradient_of_every_parameter(case, request):
    for name, expected in case.expected.gradients.items():
        assert np.abs(expected).max() > case.loss.least, f"{name}: a gradient that is nearly zero compares nothing"
    found = [apart(gradients, case.expected.gradients) for gradients in (case.gradients, case.in_single.gradients)]
    print(f"{request.node.name}: from TRL in fp64: ours {found[0]}, TRL in fp32 {found[1]}")
    assert found[0][0] <= GRADIENT and found[1][0] <= TRL_ROUNDING


def test_what_rounds_in_trl_is_its_sum_of_log_probs(ranks, tmp_path):
    """Where its step is farthest from the one in fp64, and that sum, of policy and reference, is in fp64 alone."""
    job = job_of("exo_pair Llama", ranks, tmp_path)
    expected, as_it_is = job.trl(double=True).gradients, job.trl(double=False).gradients
    with SumsInDouble():
        summed = job.trl(double=False).gradients
    off = [apart(each, expected)[0] for each in (as_it_is, summed)]
    print(f"exo_pair: from TRL in fp64: TRL in fp32 {off[0]:.1e}, with sums of log-probs in fp64 {off[1]:.1e}")
    assert off[1] < min(GRADIENT, off[0])
