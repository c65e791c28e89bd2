"""The policy's greedy answers are transformers', token for token, in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.jobs import run_job
from tests.harness.tiny_models import VOCABULARY, load_model, make_model

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
CP2, SP = ["--context-parallel-size", "2"], ["--sequence-parallel"]
VPP = [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]
LAYOUTS = {
    "one rank": (1, []),
    "TP2 SP": (2, [*TP2, *SP]),
    "PP2": (2, PP2),
    "VPP2": (2, VPP),
    "CP2": (2, CP2),
    "DP2": (2, []),
    "TP2 PP2": (4, [*TP2, *PP2]),
    "TP2 SP CP2": (4, [*TP2, *SP, *CP2]),
    "CP2 VPP2": (4, [*CP2, *VPP]),
    "EP2": (2, ["--expert-model-parallel-size", "2"]),
}
#: One model in every layout; others where something of theirs matters: windows, experts, scaled embeddings, sinks.
CASES = [("llama tied", layout) for layout in LAYOUTS if layout not in ("EP2", "TP2 SP CP2")]
CASES += [("qwen2 sliding", layout) for layout in ("one rank", "CP2 VPP2")]
CASES += [("mistral", "CP2"), ("gemma", "TP2 PP2"), ("gemma", "one rank")]
CASES += [("gemma2", "CP2 VPP2"), ("olmo3", "VPP2"), ("olmo2", "TP2 SP"), ("exaone4", "one rank")]
CASES += [("qwen3 moe", layout) for layout in ("one rank", "EP2", "TP2 SP CP2")]
CASES += [("gpt-oss", "one rank"), ("deepseek v3", "one rank"), ("deepseek v3", "CP2")]

JOB = {"max_pairs": 4, "pairs_per_step": 4, "train_iters": 1, "preference_loss": "dpo"}
LONGEST = 20  # beyond the windows of 9
_RANDOM = np.random.default_rng(5)
PROMPTS = [_RANDOM.integers(0, VOCABULARY, length).astype(np.int32) for length in (1, 5, 30, 11, 44)]
#: Tied and random, a model says its last word again, unless its embeddings are smaller than what its layers add.
SMALLER_EMBEDDINGS = {"llama tied": 0.1, "gemma": 0.01}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (directory, transformers' greedy answers to PROMPTS), made once."""
    directory, made = tmp_path_factory.mktemp("models"), {}

    def named(name):
        if name not in made:
            path = make_model(name, directory)
            if name in SMALLER_EMBEDDINGS:
                model = load_model(path)
                model.get_input_embeddings().weight.data.mul_(SMALLER_EMBEDDINGS[name])
                model.save_pretrained(path)
            made[name] = path, [generated(load_model(path), prompt, LONGEST) for prompt in PROMPTS]
        return made[name]

    return named


def generated(model: Any, prompt: np.ndarray, longest: int, end: int | None = None) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=VOCABULARY if end is None else end,  # one that no model says
        pad_token_id=0,
    )
    return found[0, ids.shape[1] :].tolist()


def answers(
    flags: list[str], ends: list[list[int]], limit: int, stop_after: int | None = None, **overrides: Any
) -> tuple[list[list[int]], list[bool], int] | None:
    """On this rank: answers to PROMPTS, which have ended, and in how many passes; None if they were given up."""
    from megatron_bdpo.data.prompts import EvalPrompts
    from megatron_bdpo.training.generation.decoding import PackShape, answer_greedily
    from megatron_bdpo.training.run import PreferenceRun

    class Answering(PreferenceRun):
        found: Any = None

        def after_load(self, model: list[Any]) -> None:
            self.model = model
            prompts = EvalPrompts([], PROMPTS, [ends] * len(PROMPTS), LONGEST, "")
            shape = PackShape(limit, self.settings.length_unit, fixed=False)
            passes: list[bool] = []

            def is_to_stop() -> bool:
                passes.append(True)
                return len(passes) - 1 == stop_after

            found = answer_greedily(model, prompts, shape, self.scoring.vocab_size, is_to_stop)
            self.found = found and (found.answers, found.finished, len(passes))
            raise SystemExit(0)

    run, _ = run_job(flags, overrides, run_type=Answering)
    return run.found


def answered(ranks, models, tmp_path, name, layout, *, ends=(), limit=128, stop_after=None):
    """What all ranks say."""
    world_size, flags = LAYOUTS[layout]
    path, _ = models(name)
    flags = ["--hf-model", str(path), *flags]
    return ranks(world_size)(
        answers, flags, list(ends), limit, stop_after=stop_after, pair_cache_dir=str(tmp_path), **JOB
    )


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: value)
def test_answers_are_those_of_transformers(ranks, models, tmp_path, name, layout):
    _, expected = models(name)
    assert len({token for answer in expected for token in answer}) > 9, "a model that always says the same"
    for found, finished, passes in answered(ranks, models, tmp_path, name, layout):
        assert found == expected
        assert not any(finished) and passes == LONGEST


@pytest.mark.parametrize("layout", ["one rank", "CP2 VPP2"])
def test_answers_end_where_transformers_end_them(ranks, models, tmp_path, layout):
    path, free = models("llama tied")
    end = free[2][7]
    expected = [generated(load_model(path), prompt, LONGEST, end) for prompt in PROMPTS]
    for found, finished, _ in answered(ranks, models, tmp_path, "llama tied", layout, ends=[[end], [VOCABULARY]]):
        assert found == expected
        assert finished == [answer[-1] == end for answer in expected]
        assert any(finished) and not all(finished)


def test_an_end_of_several_tokens(ranks, models, tmp_path):
    _, free = models("llama tied")
    ((found, finished, _),) = answered(ranks, models, tmp_path, "llama tied", "one rank", ends=[free[1][3:6]])
    assert found[1] == free[1][:6] and finished[1]
    assert found[0] == free[0] and not finished[0]


@pytest.mark.parametrize("layout", ["one rank", "CP2 VPP2"])
def test_prompts_that_do_not_fit_one_pack_come_later(ranks, models, tmp_path, layout):
    """Some are being answered while others are read."""
    _, expected = models("qwen2 sliding")
    for found, _, passes in answered(ranks, models, tmp_path, "qwen2 sliding", layout, limit=64):
        assert found == expected
        assert passes > LONGEST


def test_a_stop_is_heard_between_tokens(ranks, models, tmp_path):
    assert answered(ranks, models, tmp_path, "llama tied", "TP2 PP2", stop_after=3) == [None] * 4
