"""Adapters: a step here is the step of PEFT and transformers, and what comes out is what PEFT reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bdpo.data.store import PairStore
from tests.harness.jobs import SGD, last_stage, train
from tests.harness.lora import load_adapter, make_adapter, step_of_dpo, tensors_of
from tests.harness.ranks import RankFailure
from tests.harness.tiny_models import load_model, make_model

pytest.importorskip("peft", reason="the oracle is PEFT")

BETA, LEARNING_RATE = SGD["beta"], SGD["lr"]
TP2, SP = ["--tensor-model-parallel-size", "2"], ["--sequence-parallel"]
PP2, CP2 = ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
LAYOUTS = {
    "1 rank": (1, []),
    "TP2": (2, TP2),
    "TP2 SP": (2, [*TP2, *SP]),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "TP2 SP PP2": (4, [*TP2, *SP, *PP2]),
    "recomputed": (
        1,
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "resident": (1, ["--reference", "resident"]),
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
CASES = [
    *(("llama", "LoRA", layout) for layout in LAYOUTS),
    ("llama", "rsLoRA", "1 rank"),
    ("gemma3", "LoRA", "TP2 SP"),
    ("olmo2", "DoRA", "TP2 SP"),
    ("qwen3 biased", "LoRA", "TP2 SP"),
    *(("qwen2", "DoRA", layout) for layout in LAYOUTS if layout not in ("TP2", "PP2")),
]


@pytest.mark.parametrize(("name", "kind", "layout"), CASES)
def test_a_step_is_pefts(ranks, tmp_path, name, kind, layout):
    base = make_model(name, tmp_path)
    start = make_adapter(base, tmp_path / "start", **KINDS[kind])
    found, loss = one_step(ranks, tmp_path, base, start, *LAYOUTS[layout])
    model = load_adapter(base, start)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    expected_loss = step_of_dpo(model, PairStore.open(meta.parent), beta=BETA, lr=LEARNING_RATE)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    model.save_pretrained(tmp_path / "expected")
    compare(found, tmp_path / "expected", start)


def one_step(
    ranks, tmp_path: Path, base: Path, start: Path, world_size: int, flags: Sequence[str]
) -> tuple[Path, float]:
    """The adapters after a step, as they are exported, and the step's loss."""
    saved = tmp_path / "saved"
    outcomes = ranks(world_size)(
        train,
        ["--hf-model", str(base), "--lora-start", str(start), "--save-hf", str(saved), *flags],
        pair_cache_dir=str(tmp_path / "cache"),
        **SGD,
    )
    return saved, last_stage(outcomes).steps[0]["loss"]


def compare(found: Path, expected: Path, start: Path) -> None:
    own, theirs, before = map(tensors_of, (found, expected, start))
    assert own.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert own[name].shape == tensor.shape, name
        assert (own[name] - tensor).abs().max() <= 1e-5, name
        assert (tensor - before[name]).abs().max() > 2e-5, f"{name}: a step that would not be missed compares nothing"


@pytest.mark.parametrize("kind", ["rsLoRA", "DoRA"])
def test_pefts_adapters_come_back_unchanged(ranks, tmp_path, kind):
    """After a step at rate 0, to the bit."""
    base = make_model("qwen2", tmp_path)
    start = make_adapter(base, tmp_path / "start", targets=["q_proj", "down_proj"], **KINDS[kind])
    flags = ["--hf-model", str(base), "--lora-start", str(start), "--save-hf", str(tmp_path / "saved"), *TP2]
    ranks(2)(train, flags, pair_cache_dir=str(tmp_path / "cache"), **SGD | {"lr": 0.0, "min_lr": 0.0})
    found, expected = tensors_of(tmp_path / "saved"), tensors_of(start)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("mixtral", "experts.3.w2.lora_B"),
        ("qwen3 moe", "experts.3.down_proj.lora_B"),
    ],
)
def test_experts_are_those_of_peft(ranks, tmp_path, name, adapter):
    """PEFT puts an adapter for each expert and projection beside the experts that transformers stacks."""
    base, start = make_model(name, tmp_path), tmp_path / "start"
    made = ["--hf-model", str(base), "--lora-rank", "4", "--save-hf", str(start), *EP2]
    ranks(2)(train, made, pair_cache_dir=str(tmp_path / "cache"), **SGD | {"optimizer": "adam", "lr": 0.02})
    assert any(adapter in name and tensor.any() for name, tensor in tensors_of(start).items())
    _, loss = one_step(ranks, tmp_path, base, start, 2, [*EP2, "--save-hf-merged", str(tmp_path / "merged")])
    model = load_adapter(base, start)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    expected_loss = step_of_dpo(model, PairStore.open(meta.parent), beta=BETA, lr=0.0)
    assert expected_loss < 0.69
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    tokens = torch.arange(3, 90)[None]
    with torch.no_grad():
        expected = load_adapter(base, tmp_path / "saved")(input_ids=tokens).logits
        merged = load_model(tmp_path / "merged")(input_ids=tokens).logits
    assert (merged - expected).abs().max() <= 1e-5


def test_projections_in_one_tensor_are_refused_before_anything_is_built(ranks, tmp_path):
    """PEFT's adapter beside qkv_proj is one of all three; those beside o_proj and down_proj are as anywhere."""
    base, start = make_model("phi3", tmp_path), tmp_path / "start"
    flags = ["--hf-model", str(base), "--lora-rank", "4"]
    with pytest.raises(
        RankFailure, match=r"UserError: the model keeps q_proj, k_proj, v_proj in one tensor \(qkv_proj"
    ):
        ranks(1)(train, flags, **SGD)
    start = make_adapter(base, start, targets=["o_proj", "down_proj"])
    found, loss = one_step(ranks, tmp_path, base, start, 1, ["--lora-targets", "o_proj,down_proj"])
    model = load_adapter(base, start)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    assert loss == pytest.approx(step_of_dpo(model, PairStore.open(meta.parent), beta=BETA, lr=LEARNING_RATE), abs=1e-6)
    model.save_pretrained(tmp_path / "expected")
    compare(found, tmp_path / "expected", start)


@pytest.mark.parametrize("name", ["qwen2 moe mixed", "glm4 moe"])
def test_attention_of_models_with_experts_and_other_mlps(ranks, tmp_path, name):
    """PEFT beside transformers 5 reads adapters of the ones or the others, whose projections it calls alike."""
    base = make_model(name, tmp_path)
    with pytest.raises(RankFailure, match=r"UserError: the model has experts and other MLPs"):
        ranks(1)(train, ["--hf-model", str(base), "--lora-rank", "4"], **SGD)
    start = make_adapter(base, tmp_path / "start", targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    found, loss = one_step(ranks, tmp_path, base, start, 2, EP2)
    model = load_adapter(base, start)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    assert loss == pytest.approx(step_of_dpo(model, PairStore.open(meta.parent), beta=BETA, lr=LEARNING_RATE), abs=1e-6)
    model.save_pretrained(tmp_path / "expected")
    compare(found, tmp_path / "expected", start)
