"""Packs of pairs with shared prompts give what one sequence at a time gives: log-probs, loss and gradients.

Two oracles: our own model without packing and sharing, and Hugging Face's Llama with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import build_model, token_log_probs
from tests.harness.jobs import TINY_MODEL, Outcome, last_stage, run_job, scores_in, train, whole_weights

PAIRS = 12  # all in one step: several packs of several pairs
ONE_AT_A_TIME = ["--no-pack-pairs", "--no-share-prompts"]

# One plain gradient step so long that what was there before is rounding: the weights after it are the gradient.
GRADIENT_STEP = ["--optimizer", "sgd", "--sgd-momentum", "0", "--weight-decay", "0", "--clip-grad", "0", "--lr", "1e6"]

# fp32 throughout; sums of some hundred terms are added in another order.
RELATIVE = 1e-5


@dataclass(frozen=True)
class Run:
    """A finished job and the reference values it has left in its cache: those of the initial weights."""

    cache: Path
    outcome: Outcome

    @property
    def log_probs(self) -> dict[str, np.ndarray]:
        """'conditional' and 'unconditional', [P, 2], as far as the loss needs them."""
        scores = scores_in(self.cache)
        found = {"conditional": scores.conditional, "unconditional": scores.unconditional}
        return {kind: values for kind, values in found.items() if np.isfinite(values).all()}


def run(ranks, cache: Path, flags: list[str]) -> Run:
    """One step over all pairs. Initial weights are drawn wide: at the usual 0.02 a model hardly looks at its prompt."""
    overrides = {"max_pairs": PAIRS, "pairs_per_step": PAIRS, "train_iters": 1, "init_method_std": 0.2}
    (outcome,) = ranks(1)(train, flags, pair_cache_dir=str(cache), **overrides)
    return Run(cache, outcome)


@pytest.fixture(scope="module", params=["bdpo", "simpo"])
def both(request, ranks, tmp_path_factory) -> tuple[Run, Run]:
    """The packed run and the run with one sequence at a time."""
    flags = ["--preference-loss", request.param, *GRADIENT_STEP]
    packed = run(ranks, tmp_path_factory.mktemp("packed"), flags)
    single = run(ranks, tmp_path_factory.mktemp("single"), flags + ONE_AT_A_TIME)
    return packed, single


def test_metrics_equal_those_of_one_sequence_at_a_time(both):
    packed, single = both
    ((step,), (expected,)) = last_stage([packed.outcome]).steps, last_stage([single.outcome]).steps
    assert step.keys() == expected.keys()
    for name, expected_value in expected.items():
        if not name.startswith("throughput"):
            assert step[name] == pytest.approx(expected_value, rel=RELATIVE, abs=1e-6), name


@pytest.mark.parametrize("both", ["bdpo"], indirect=True)  # its cache holds every pair's log-probs, of both kinds
def test_log_probs_equal_those_of_one_sequence_at_a_time(both):
    packed, single = both
    expected = single.log_probs
    assert expected.keys() == {"conditional", "unconditional"}
    for kind, expected_values in expected.items():
        assert packed.log_probs[kind] == pytest.approx(expected_values, rel=RELATIVE), kind


def test_gradients_equal_those_of_one_sequence_at_a_time(both):
    packed, single = both
    gradients, expected = whole_weights([packed.outcome]), whole_weights([single.outcome])
    assert gradients.keys() == expected.keys()
    for name, expected_value in expected.items():
        scale = np.abs(expected_value).max()
        assert scale > 100, f"{name}: the gradient shall outweigh the weights of before"
        assert np.abs(gradients[name] - expected_value).max() <= RELATIVE * scale, name


# Hugging Face


@pytest.fixture(scope="module")
def untrained(ranks, tmp_path_factory) -> Run:
    """A packed run that leaves the weights as they were, so that they can be given to Hugging Face.

    Its vocabulary is padded, to 1500 rows; Hugging Face's is not.
    """
    flags = ["--lr", "0", "--weight-decay", "0", "--make-vocab-size-divisible-by", "1500"]
    return run(ranks, tmp_path_factory.mktemp("untrained"), flags)


@pytest.fixture(scope="module")
def llama(untrained) -> Any:
    pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")
    return build_model("llama", TINY_MODEL, whole_weights([untrained.outcome]))


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_log_probs_equal_hugging_face_llama(untrained, llama, kind):
    (directory,) = [path.parent for path in untrained.cache.glob("*/meta.json")]
    store = PairStore.open(directory)
    expected = np.zeros((PAIRS, 2))
    for row in range(PAIRS):
        pair = store.pair(row)
        prompt = pair.prompt if kind == "conditional" else store.empty_prompt
        expected[row] = [token_log_probs(llama, prompt, response).sum() for response in (pair.chosen, pair.rejected)]
    assert untrained.log_probs[kind] == pytest.approx(expected, rel=RELATIVE)


def test_the_tiny_model_reads_its_prompt(untrained):
    """Else the comparisons above would not notice a prompt that is not attended to."""
    values = untrained.log_probs
    assert np.abs(values["conditional"] - values["unconditional"]).min() > 1e-2


# Groups of other sizes

#: Tokens of prompt and answers.
SIZES = [(9, 4, 7, 1), (3, 5), (6, 2, 8, 3, 1, 4), (12, 6, 9)]


def log_probs_of_groups(flags: list[str]) -> dict[str, list[float]]:
    """On this rank: log-probs of all answers of ``SIZES``, in one pack, without sharing, and each in a pack alone."""
    import torch

    from megatron_bdpo.data.context import context_part
    from megatron_bdpo.data.packs import Group, lay_out
    from megatron_bdpo.training.batches import to_batch
    from megatron_bdpo.training.forward import score_pack
    from megatron_bdpo.training.pack_iterators import context_rank
    from megatron_bdpo.training.run import PreferenceRun

    draw = np.random.default_rng(0)
    groups = [
        Group(
            draw.integers(3, 200, prompt, dtype=np.int32), [draw.integers(3, 200, n, dtype=np.int32) for n in answers]
        )
        for prompt, *answers in SIZES
    ]
    found: dict[str, list[float]] = {}
    length = 144  # with padding

    class Scoring(PreferenceRun):
        def after_load(self, model: list[Any]) -> None:
            super().after_load(model)

            @torch.no_grad()
            def score(some: list[Group], share: bool) -> list[float]:
                pack = context_part(lay_out(some, length, share_prompts=share), context_rank())
                values: list[float] = score_pack(model[0].module, to_batch(pack, length, length), self.scoring).tolist()
                return values

            alone = [Group(group.prompt, [answer]) for group in groups for answer in group.answers]
            found["together"], found["repeated"] = score(groups, True), score(groups, False)
            found["alone"] = [value for each in alone for value in score([each], True)]
            raise SystemExit(0)

    run_job([*flags, "--preference-loss", "simpo"], {"init_method_std": 0.2}, run_type=Scoring)
    return found


@pytest.mark.parametrize("flags", [[], ["--context-parallel-size", "2"]], ids=["one rank", "CP2"])
def test_a_group_of_any_size_gives_the_log_probs_of_its_sequences(ranks, one_answer_each, flags):
    for found in ranks(len(flags) or 1)(log_probs_of_groups, flags):
        assert len(found["together"]) == sum(len(answers) for _, *answers in SIZES) == 11
        for layout, values in found.items():
            assert values == pytest.approx(one_answer_each, rel=RELATIVE), layout


@pytest.fixture(scope="module")
def one_answer_each(ranks) -> list[float]:
    """Each answer alone, on one rank. They differ, so that none can stand for another."""
    values = ranks(1)(log_probs_of_groups, [])[0]["alone"]
    assert np.diff(np.sort(values)).min() > 1e-3
    return values
