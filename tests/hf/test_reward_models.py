"""Reward models: the step that TRL's RewardTrainer takes, the same in every layout, and transformers' own rewards."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_bdpo.model.hf.classifier import WITHOUT, classifier_config, classifier_of
from megatron_bdpo.model.hf.families import FAMILIES
from tests.distributed.test_bad_input import refusal
from tests.harness.huggingface import renamed
from tests.harness.jobs import DATA, SGD, last_stage, score, train
from tests.harness.recording import Recording, merge, train_and_record
from tests.harness.reward_models import build_model, load_model, pairs_in, rewards, trl_step
from tests.harness.tiny_models import make_model
from tests.parity.matrix import CP2, PP2, TP2, TP2_SP

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PAIRS, CENTERING = 6, 0.05
#: What all answers end with. For padding too, as in many models, it is no token that rewards are read at.
END = 2
JOB = {name: value for name, value in SGD.items() if name not in ("preference_loss", "beta")} | {
    "objective": "reward",
    "center_rewards_coefficient": CENTERING,
    "max_pairs": PAIRS,
    "pairs_per_step": PAIRS,
}
LAYOUTS = {
    "TP2": (2, TP2),
    "TP2 SP": (2, TP2_SP),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "TP2 SP CP2": (4, f"{TP2_SP} {CP2}"),
    "alone and unshared": (1, "--no-pack-pairs --no-share-prompts"),
}
#: fp32, relative to the largest element of a tensor.
ALLOWED = 2e-5


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_model("llama tied", tmp_path_factory.mktemp("reward"), pad_token_id=END)


@pytest.fixture(scope="module")
def recorded(ranks, original, tmp_path_factory):
    """``recorded(layout)``: the step in a layout."""
    directory = tmp_path_factory.mktemp("recorded")

    def recorded(ranks_wanted: int, flags: str, mistake: Any = None) -> Recording[dict[str, np.ndarray]]:
        return merge(
            ranks(ranks_wanted)(
                train_and_record,
                ["--hf-model", str(original), *flags.split()],
                mistake=mistake,
                pair_cache_dir=str(directory / "cache"),
                **JOB,
            )
        )

    recorded.cache = directory / "cache"
    return recorded


@pytest.fixture(scope="module")
def alone(recorded):
    return recorded(1, "")


def config_of(original: Path) -> dict[str, Any]:
    return classifier_config(json.loads((original / "config.json").read_text()), FAMILIES["llama"])


def deviation(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest over tensors, relative to the largest element of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-4, f"{name}: nothing is compared"
    return max(float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items())


def gradients(step: Any, original: Path) -> dict[str, np.ndarray]:
    """By Hugging Face's names, without the rows that pad the vocabulary to other sizes in other layouts."""
    return renamed(step.gradients, config_of(original))


def begins_alike(step: Any, other: Any, original: Path) -> bool:
    """Whether two steps begin with the same weights, the drawn head's among them."""
    found, expected = (renamed(each.weights, config_of(original)) for each in (step, other))
    return all(np.array_equal(found[name], value) for name, value in expected.items())


def test_loss_rewards_and_gradients_are_trls(alone, original, recorded, tmp_path):
    pytest.importorskip("trl", reason="the oracle is TRL's RewardTrainer")
    step, config = alone.steps[0], config_of(original)
    pairs = pairs_in(recorded.cache)
    expected = trl_step(build_model(config, step.weights), pairs, tmp_path, center_rewards_coefficient=CENTERING)
    for name, theirs in {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "rewards/mean": "mean_reward",
    }.items():
        assert step.metrics[name] == pytest.approx(expected.metrics[theirs], rel=ALLOWED, abs=1e-6), name
    assert 0 < expected.metrics["accuracy"] < 1, "some margins shall be positive and some negative"
    assert deviation(gradients(step, original), expected.gradients) <= ALLOWED


def test_margins_of_rows_are_trls(ranks, original, tmp_path):
    """Of four rows; the others ask for none. Two ranks, so that they travel with their pairs."""
    pytest.importorskip("trl", reason="the oracle is TRL's RewardTrainer")
    margins = [0.5, 3.0, None, 1.25, -1.0, None]
    lines = (DATA / "train.jsonl").read_text().splitlines()[:PAIRS]
    rows = [json.loads(line) | {"margin": margin} for line, margin in zip(lines, margins, strict=True)]
    data, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = JOB | {"pair_data": [str(data)], "pair_cache_dir": str(cache)}
    step = merge(ranks(2)(train_and_record, ["--hf-model", str(original)], **overrides)).steps[0]
    model = build_model(config_of(original), step.weights)
    asked = [margin or 0.0 for margin in margins]
    expected = trl_step(model, pairs_in(cache), tmp_path, asked, center_rewards_coefficient=CENTERING)
    assert step.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=ALLOWED)
    assert deviation(gradients(step, original), expected.gradients) <= ALLOWED


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_step(alone, recorded, original, layout):
    found, expected = recorded(*LAYOUTS[layout]).steps[0], alone.steps[0]
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=2e-6)
    assert begins_alike(found, expected, original)
    assert deviation(gradients(found, original), gradients(expected, original)) <= ALLOWED


# Mistakes: each is what one of the comparisons is for -----------------------------------------------------------------


def rewards_of_other_ranks_left_out(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model import reward_head

    undo.enter_context(
        mock.patch.object(reward_head, "reduce_from_tensor_model_parallel_region", lambda whole, group: whole)
    )


def head_not_summed_over_the_sequence(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model import pair_gpt

    class Head(pair_gpt.RewardHead):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.weight.sequence_parallel = False

    undo.enter_context(mock.patch.object(pair_gpt, "RewardHead", Head))


def padding_not_looked_at(undo: contextlib.ExitStack) -> None:
    """The last token, which is also that for padding."""
    from megatron_bdpo.data import packs

    undo.enter_context(mock.patch.object(packs._PackBuilder, "_is_padding", lambda self, place: False))


def head_drawn_by_each_rank(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training.hf import start

    def draw(model: list[Any], seed: int, only: Any = None) -> list[Any]:
        return original(model, seed + 1, only)

    original = start.initialize_by_name
    undo.enter_context(mock.patch.object(start, "initialize_by_name", draw))


MISTAKES = {
    "TP2 SP, rewards": (2, TP2_SP, rewards_of_other_ranks_left_out),
    "CP2, rewards": (2, CP2, rewards_of_other_ranks_left_out),
    "TP2 SP, head": (2, TP2_SP, head_not_summed_over_the_sequence),
    "PP2, head": (2, PP2, head_drawn_by_each_rank),
    "unshared, ends": (1, "--no-share-prompts", padding_not_looked_at),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(alone, recorded, original, mistake):
    size, flags, change = MISTAKES[mistake]
    found, expected = recorded(size, flags, change).steps[0], alone.steps[0]
    of_loss = abs(found.metrics["loss"] - expected.metrics["loss"])
    distance = max(of_loss, deviation(gradients(found, original), gradients(expected, original)))
    assert distance > 100 * ALLOWED or not begins_alike(found, expected, original)


# To transformers and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "flags"),
    [
        ("llama tied", 2, TP2_SP),
        ("qwen2", 2, PP2),
        ("gemma2", 1, ""),
        ("gemma3", 1, ""),
        ("phi3", 1, ""),
        ("gpt-oss", 1, ""),
    ],
)
def test_export_gives_the_same_rewards_in_transformers(ranks, tmp_path, name, size, flags):
    """The step's loss is of the weights that the export before it has."""
    model, first, second = make_model(name, tmp_path), tmp_path / "first", tmp_path / "second"
    cache = tmp_path / "cache"
    ranks(size)(
        train, ["--hf-model", str(model), "--save-hf", str(first), *flags.split()], pair_cache_dir=str(cache), **JOB
    )
    outcomes = ranks(1)(train, ["--hf-model", str(first), "--save-hf", str(second)], pair_cache_dir=str(cache), **JOB)
    found = last_stage(outcomes).steps[0]
    expected = rewards(load_model(first), pairs_in(cache)).mean(axis=0)
    assert [found["rewards/chosen"], found["rewards/rejected"]] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    config = json.loads((second / "config.json").read_text())
    assert config["architectures"] == [classifier_of(FAMILIES[config["model_type"]])]
    assert (config["num_labels"], config["problem_type"]) == (1, "regression")
    stored = load_file(first / "model.safetensors") if (first / "model.safetensors").exists() else {}
    assert "lm_head.weight" not in stored


def test_every_family_that_transformers_has_a_class_for():
    for family in FAMILIES.values():
        if family.model_type in WITHOUT:
            assert not hasattr(transformers, family.architecture.replace("ForCausalLM", "ForSequenceClassification"))
        else:
            assert hasattr(transformers, classifier_of(family)), family.model_type


def test_a_run_goes_on_from_its_checkpoint_and_its_checkpoint_is_exported(ranks, original, tmp_path):
    from tests.hf.test_training import converted

    job = JOB | {"pairs_per_step": 2, "train_iters": 3, "optimizer": "adam", "lr": 1e-3}
    flags = ["--hf-model", str(original), "--save-interval", "1"]
    kept = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    ranks(2)(train, [*flags, *kept, *TP2.split(), "--exit-interval", "2"], **job)
    resumed = ranks(1)(train, [*flags, *kept, "--save-hf", str(tmp_path / "live")], **job)
    whole = ranks(1)(train, [*flags, "--save", str(tmp_path / "whole")], **job)
    assert last_stage(resumed).steps[-1]["loss"] == pytest.approx(last_stage(whole).steps[-1]["loss"], rel=1e-5)
    arguments = ("--checkpoint", tmp_path / "run", "--hf-model", original, "--output", tmp_path / "exported")
    converted(ranks, "export", *arguments)
    live, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "exported"))
    assert live.keys() == stored.keys() and "score.weight" in live
    assert all(torch.equal(live[name], value) for name, value in stored.items())
    (other,) = ranks(1)(refusal, ["--hf-model", str(original), *kept, "--save-interval", "1"])
    assert "is of --objective reward, this run of --objective preference. Add --objective reward" in other


# Scoring --------------------------------------------------------------------------------------------------------------

SCORED = {"max_pairs": PAIRS, "pairs_per_step": None, "train_iters": None, "lr": None}


@pytest.fixture(scope="module")
def reward_model(original, tmp_path_factory):
    """By transformers, with a head of its own."""
    directory = tmp_path_factory.mktemp("model") / "reward"
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(original, num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("size", "flags"), [(1, ""), (4, f"{TP2_SP} {PP2}"), (2, CP2), (2, "--no-pack-pairs")])
def test_scoring_writes_transformers_rewards(ranks, reward_model, tmp_path, size, flags):
    target, cache = tmp_path / "out" / "rewards.jsonl", tmp_path / "cache"
    command = ["--objective", "reward", "--hf-model", str(reward_model), "--rewards", str(target), *flags.split()]
    ranks(size)(score, command, pair_cache_dir=str(cache), **SCORED)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, PAIRS + 1))
    assert {Path(line["source"]).name for line in lines} == {"train.jsonl"}
    found = np.array([[line["chosen"], line["rejected"]] for line in lines])
    assert found == pytest.approx(rewards(load_model(reward_model), pairs_in(cache)), rel=1e-5, abs=1e-5)


def refused_score(flags: list[str], **overrides: Any) -> str:
    """The UserError that scoring on this rank ends with."""
    from megatron_bdpo.errors import UserError

    try:
        score(flags, **overrides)
    except UserError as error:
        return str(error)
    return "no error"


def test_what_cannot_be_scored_is_refused(ranks, original, reward_model, tmp_path):
    there, cache = tmp_path / "there", str(tmp_path / "cache")
    there.write_text("")
    of = ["--objective", "reward", "--hf-model"]
    for flags, expected in {
        (*of, str(reward_model)): "name the file that scoring is to write with --rewards FILE",
        (*of, str(original), "--rewards", str(tmp_path / "new")): "has no head to score with. Name a reward model",
        (*of, str(reward_model), "--rewards", str(there)): "is there already. Remove it",
    }.items():
        (found,) = ranks(1)(refused_score, list(flags), pair_cache_dir=cache, **SCORED)
        assert expected in found
