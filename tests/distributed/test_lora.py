"""Runs with adapters: what checkpoints hold and refuse, the reference that is the base, and what is exported."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.test_resume import STEPS, assert_bit_identical, run_in_two_parts
from tests.harness.jobs import flags_of, last_stage, score, train, whole_weights
from tests.harness.parity import assert_same_steps
from tests.harness.ranks import RankFailure
from tests.harness.tiny_models import load_model, make_model

LORA = ["--lora-rank", "4", "--lora-alpha", "32"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
OVERLAPPED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
CASES = {
    "LoRA with dropout": (2, [*LORA, *TP2, "--lora-dropout", "0.2"]),
    "distributed optimizer, resident": (2, [*LORA, *OVERLAPPED, "--reference", "resident"]),
    "DoRA": (1, [*LORA, "--lora-type", "dora", "--lora-targets", "attention"]),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_bit_identical(ranks, tmp_path, case):
    assert_bit_identical(*run_in_two_parts(ranks, CASES[case][0], tmp_path, CASES[case][1]))
    stored = names_in(tmp_path / "whole" / "iter_0000004")
    assert stored and all("_adapter." in name for name in stored), "the base is in no checkpoint"


def names_in(checkpoint: Path) -> list[str]:
    """Of the weights in a checkpoint, the optimizer's copies among them."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(str(checkpoint)).read_metadata()
    return [name for name in metadata.state_dict_metadata if "decoder." in name or "embedding." in name]


def test_a_resident_reference_is_the_policy_without_its_adapters(ranks, tmp_path):
    """Its pass comes before every step's, in the midst of gathering weights layer by layer."""
    flags = [*LORA, *OVERLAPPED]
    runs = {
        mode: ranks(2)(train, [*flags, "--reference", mode], pair_cache_dir=str(tmp_path))
        for mode in ("base", "resident")
    }
    steps = {mode: last_stage(outcomes).steps for mode, outcomes in runs.items()}
    for step in steps["base"]:  # a resident reference does not know the quartiles of imbalance beforehand
        for name in [name for name in step if "imbalance_q" in name]:
            del step[name]
    assert_same_steps(steps["resident"], steps["base"])
    for name, expected in whole_weights(runs["base"]).items():
        assert np.allclose(whole_weights(runs["resident"])[name], expected, atol=1e-6), name


def test_all_runs_on_a_base_share_its_log_probs(ranks, tmp_path):
    for flags in ([], LORA, ["--lora-rank", "2", "--lora-type", "dora"]):
        ranks(1)(train, flags, pair_cache_dir=str(tmp_path), train_iters=1)
    assert len(list(tmp_path.glob("reference-*"))) == 1


def test_nothing_but_adapters_moves(ranks):
    first, second = (
        whole_weights(ranks(1)(train, [*LORA, "--lora-targets", "q_proj,v_proj"], train_iters=steps))
        for steps in (1, 2)
    )
    moved = {name for name, weight in first.items() if not np.array_equal(weight, second[name])}
    assert moved == {
        f"decoder.layers.self_attention.linear_qkv_adapter.{projection}_{part}"
        for projection in ("q_proj", "v_proj")
        for part in "AB"
    }


def test_half_precision_begins_as_its_reference(ranks):
    """DoRA's norms, rounded to bf16, would be off by a hundred times what the check at step 0 allows."""
    (outcome,) = ranks(1)(train, [*LORA, "--lora-type", "dora", "--bf16"])
    assert outcome.steps[0]["rewards/margins"] == 0.0
    assert outcome.steps[-1]["rewards/margins"] != 0.0


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """(base, directory): adapters that four ranks trained beside a model of Hugging Face's, exported and kept."""
    directory = tmp_path_factory.mktemp("lora")
    base = make_model("qwen2", directory)
    places = {"hf-model": base, "save": directory / "run", "save-hf": directory / "adapters"}
    places |= {"save-hf-merged": directory / "merged"}
    layout = [*TP2, "--sequence-parallel", *PP2]
    flags = [*flags_of(places), "--save-interval", "2", *LORA, "--lora-type", "dora", *layout]
    ranks(4)(train, flags, train_iters=2, **SMALL)
    return base, directory


#: Few pairs, for runs of which only what they leave is looked at.
SMALL = {"max_pairs": 16, "pairs_per_step": 4, "lr": 1e-2}


def convert(*arguments: object) -> tuple[int, str]:
    """The exit code of ``megatron-bdpo convert`` and what it writes to stderr; on a rank, which has Megatron."""
    from megatron_bdpo.cli.main import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(["convert", *map(str, arguments)])
    return code, errors.getvalue()


@torch.no_grad()
def test_all_that_is_exported_is_one_model(ranks, trained):
    """Live and from the checkpoint, apart and merged: the logits of PEFT on the base."""
    peft = pytest.importorskip("peft", reason="the oracle is PEFT")
    base, directory = trained
    commands = {
        "exported": ["export", "--checkpoint", directory / "run", "--hf-model", base],
        "merged checkpoint": ["merge", "--adapters", directory / "run", "--hf-model", base],
        "merged adapters": ["merge", "--adapters", directory / "adapters", "--hf-model", base],
    }
    for name, words in commands.items():
        ((code, errors),) = ranks(1)(convert, *words, "--output", directory / name)
        assert code == 0, errors
    tokens = torch.arange(3, 90)[None]
    expected = peft.PeftModel.from_pretrained(load_model(base), directory / "adapters")(input_ids=tokens).logits
    assert (expected - load_model(base)(input_ids=tokens).logits).abs().max() > 1e-2
    again = peft.PeftModel.from_pretrained(load_model(base), directory / "exported")(input_ids=tokens).logits
    assert (again - expected).abs().max() <= 5e-6
    for name in ("merged", "merged checkpoint", "merged adapters"):
        assert (load_model(directory / name)(input_ids=tokens).logits - expected).abs().max() <= 5e-6, name


OTHERS = "were trained beside weights with the fingerprint"
DORA = [*LORA, "--lora-type", "dora"]
REFUSED = {
    "a resume on another base": (["--hf-model", "OTHER", "--load", "RUN", *DORA], OTHERS),
    "adapters of another base": (["--hf-model", "OTHER", "--lora-start", "ADAPTERS"], OTHERS),
    "a new run on another base": (["--hf-model", "OTHER", "--load", "RUN", "--finetune", *DORA], OTHERS),
    "another rank": (["--hf-model", "BASE", "--load", "RUN", *DORA, "--lora-rank", "8"], "rank: 4 there, 8 here"),
    "no adapters": (["--hf-model", "BASE", "--load", "RUN"], "holds adapters and no model"),
    "one place for two": (["--hf-model", "BASE", *DORA, "--save-hf", "x", "--save-hf-merged", "x"], "both name"),
    "a smaller base": (["--hf-model", "SMALL", "--lora-start", "FOREIGN"], "of another shape: .*down_proj.lora_A"),
}


@pytest.fixture(scope="module")
def places(trained) -> dict[str, str]:
    """The words of ``REFUSED`` that stand for a directory."""
    base, directory = trained
    other = directory / "other"
    shutil.copytree(base, other)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 5] += 0.01
    save_file(weights, other / "model.safetensors")
    small = make_model("qwen2", directory / "small", intermediate_size=80)
    found = {"BASE": base, "OTHER": other, "SMALL": small, "RUN": directory / "run", "ADAPTERS": directory / "adapters"}
    found["FOREIGN"] = directory / "foreign"  # says nothing about its base
    shutil.copytree(found["ADAPTERS"], found["FOREIGN"], ignore=shutil.ignore_patterns("base_weights.json"))
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(ranks, places, case):
    flags, expected = REFUSED[case]
    with pytest.raises(RankFailure, match=expected):
        ranks(1)(train, [places.get(flag, flag) for flag in flags], train_iters=2, **SMALL)


def test_scores_are_not_filed_under_another_base(ranks, places):
    with pytest.raises(RankFailure, match=OTHERS):
        ranks(1)(score, ["--hf-model", places["OTHER"], "--lora-start", places["ADAPTERS"]], **SMALL)


def test_a_base_may_move(ranks, places, tmp_path):
    """A resumed run knows it by its weights."""
    shutil.copytree(places["BASE"], tmp_path / "moved")
    shutil.copytree(places["RUN"], tmp_path / "run")
    flags = ["--hf-model", str(tmp_path / "moved"), "--load", str(tmp_path / "run"), *DORA, "--reference", "resident"]
    ranks(1)(train, flags, train_iters=2, **SMALL)


def test_a_checkpoint_as_the_base(ranks, tmp_path):
    """Adapters stand beside its weights, whatever the layout, and are resumed beside them in another."""
    ranks(2)(train, [*STEPS, *PP2, "--save", str(tmp_path / "sft")], **SMALL)
    flags = [*STEPS, *LORA, "--pretrained-checkpoint", str(tmp_path / "sft")]
    kept = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    first = last_stage(ranks(2)(train, [*flags, *TP2, *kept, "--exit-interval", "2"], **SMALL))
    assert first.steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first.steps[1]["rewards/margins"] != 0
    (whole,) = ranks(1)(train, [*flags, "--save", str(tmp_path / "whole")], **SMALL)
    (resumed,) = ranks(1)(train, [*flags, *kept], **SMALL)
    assert_same_steps(resumed.steps, whole.steps[2:])
    with pytest.raises(RankFailure, match="holds a whole model and no adapters"):
        ranks(1)(train, [*STEPS, *LORA, "--load", str(tmp_path / "sft"), "--save", str(tmp_path / "x")], **SMALL)
