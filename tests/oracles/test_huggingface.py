"""Hugging Face with the same weights gives the same log-prob for every scored token, packed and shared or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_bdpo.data.store import PairStore
from megatron_bdpo.training.reference.cache import Scores
from tests.harness.huggingface import FAMILIES, build_model, token_log_probs
from tests.harness.jobs import TINY_MODEL, scores_in
from tests.harness.recording import Step, merge, train_and_record

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

PAIRS = 12  # all in one step: several packs of several pairs

LAYOUTS = {
    "1 rank": (1, []),
    "TP2 PP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}

# Tied embeddings have a copy on the first and on the last stage; untied ones are no different there.
CASES = {
    f"{family} {'tied' if tied else 'untied'} {layout}": (family, tied, layout)
    for family in FAMILIES
    for tied in (True, False)
    for layout in LAYOUTS
    if tied or layout == "1 rank"
}

# fp32 rounding: log-probs are up to 10 nats, where one unit in the last place is 1e-6, after four layers of either.
TOKEN = 1e-5
# Relative to sums of some hundred tokens, in which those errors mostly cancel.
SEQUENCE = 1e-6


@dataclass(frozen=True)
class Case:
    """A finished job, and Hugging Face's model with its initial weights."""

    step: Step
    cache: Path
    store: PairStore
    model: Any

    @property
    def reference(self) -> Scores:
        """What the job has scored before its first step."""
        return scores_in(self.cache)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, ranks, tmp_path_factory) -> Case:
    """Initial weights are drawn wide: at the usual 0.02 a model hardly looks at its prompt, or at its positions."""
    family, tied, layout = request.param
    model = TINY_MODEL | FAMILIES[family] | {"untie_embeddings_and_output_weights": not tied}
    job = {"max_pairs": PAIRS, "pairs_per_step": PAIRS, "train_iters": 1, "init_method_std": 0.1}
    cache = tmp_path_factory.mktemp("cache")
    world_size, flags = LAYOUTS[layout]
    flags = [*flags, "--preference-loss", "bdpo", "--make-vocab-size-divisible-by", "1500"]
    (step,) = merge(ranks(world_size)(train_and_record, flags, pair_cache_dir=str(cache), **model, **job)).steps
    (meta,) = cache.glob("*/meta.json")
    return Case(step, cache, PairStore.open(meta.parent), build_model(family, model, step.weights))


def test_log_probs_of_tokens(case):
    assert sorted(case.step.tokens) == list(range(PAIRS))
    for row, answers in case.step.tokens.items():
        pair = case.store.pair(row)
        for log_probs, response in zip(answers, (pair.chosen, pair.rejected), strict=True):
            expected = token_log_probs(case.model, pair.prompt, response)
            assert log_probs == pytest.approx(expected, abs=TOKEN, rel=0), f"pair {row}"


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_reference_values_of_sequences(case, kind):
    for row, values in enumerate(getattr(case.reference, kind)):
        pair = case.store.pair(row)
        prompt = pair.prompt if kind == "conditional" else case.store.empty_prompt
        expected = [token_log_probs(case.model, prompt, response).sum() for response in (pair.chosen, pair.rejected)]
        assert values == pytest.approx(expected, rel=SEQUENCE), f"pair {row}"
