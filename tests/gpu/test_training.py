"""The whole job on one GPU: the gate at the first step, learning, resuming, and the options that meet there."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from tests.distributed.test_resume import assert_bit_identical, run_in_two_parts
from tests.harness.jobs import last_stage, train

pytestmark = pytest.mark.gpu

LN_2 = math.log(2)

#: Wide enough for FP8's tiles of 128.
WIDE = ["--hidden-size", "256", "--ffn-hidden-size", "512", "--num-attention-heads", "4", "--seq-length", "1024"]

#: What the first loss may be off by: beta / 2 for each answer of up to 64 tokens, times the gate's tolerance.
#: fp16's usual first loss scale skips the first steps.
#: Transformer Engine's products read fp32 as TF32, which has fp16's mantissa.
FP32_OFF_BY = 1.6e-2 if importlib.util.find_spec("transformer_engine") else 4e-5
OFF_BY = {"": FP32_OFF_BY, "--bf16": 8e-2, "--fp16 --initial-loss-scale 1024": 1.6e-2}


def losses(outcomes) -> list[float]:
    return [step["loss"] for step in last_stage(outcomes).steps]


@pytest.mark.parametrize("precision", OFF_BY)
@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_first_step_is_at_the_reference(ranks, precision, reference):
    found = losses(ranks(1)(train, [*WIDE, *precision.split(), "--reference", reference, "--preference-loss", "dpo"]))
    assert found[0] == pytest.approx(LN_2, abs=OFF_BY[precision])


@pytest.mark.parametrize("backend", ["varlen", "sdpa", "te"])
def test_deterministic_mode_repeats_and_resumes_to_the_bit(ranks, tmp_path, backend):
    """bf16, whichever computes attention: twice the same metrics and weights, and the same in two parts."""
    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")
    flags = [*WIDE, "--bf16", "--deterministic-mode", "--pair-attention", backend]
    uninterrupted, resumed = run_in_two_parts(ranks, 1, tmp_path / "one", flags)
    assert_bit_identical(uninterrupted, resumed)
    again, _ = run_in_two_parts(ranks, 1, tmp_path / "two", flags)
    assert_bit_identical(again, resumed)


def test_it_learns(ranks):
    found = losses(ranks(1)(train, [*WIDE, "--bf16", "--train-iters", "30"]))
    assert found[-1] < 0.5 * LN_2


def test_sharing_prompts_changes_nothing(ranks):
    """Of the eight pairs that there are: with more, the two layouts cut steps of other pairs."""
    flags = [*WIDE, "--bf16", "--preference-loss", "dpo", "--max-pairs", "8"]
    shared, unshared = (losses(ranks(1)(train, [*flags, *more])) for more in ([], ["--no-share-prompts"]))
    assert shared == pytest.approx(unshared, abs=2e-2)  # bf16 over three steps, in packs of other lengths


def test_fused_and_plain_log_probs_agree(ranks):
    fused, plain = (losses(ranks(1)(train, [*WIDE, "--bf16", "--log-probs", kernel])) for kernel in ("fused", "plain"))
    assert fused == pytest.approx(plain, abs=1e-2)  # bf16


def test_fused_and_plain_local_layers_agree(ranks):
    flags = [*WIDE, "--transformer-impl", "local", "--train-iters", "5"]
    fused, plain = (losses(ranks(1)(train, [*flags, switch])) for switch in FUSION)
    assert fused == pytest.approx(plain, abs=1e-4)  # fp32


FUSION = ("--fuse-local-layers", "--no-fuse-local-layers")


def test_deterministic_fp32_resumes_to_the_bit(ranks, tmp_path):
    """Without the mode it does not: what is gathered is added up in an order that varies."""
    assert_bit_identical(*run_in_two_parts(ranks, 1, tmp_path, [*WIDE, "--deterministic-mode"]))


def fp8_flags(recipe: str) -> list[str]:
    """A model and a precision that the recipe can quantise; skips where it cannot."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    return [*WIDE, "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_passes_the_gate_and_learns(ranks, recipe):
    assert losses(ranks(1)(train, [*fp8_flags(recipe), "--train-iters", "30"]))[-1] < 0.5 * LN_2


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_resumes(ranks, tmp_path, recipe):
    """There is no state of Transformer Engine's that it would have to load."""
    whole, resumed = map(losses, run_in_two_parts(ranks, 1, tmp_path, fp8_flags(recipe)))
    assert resumed == pytest.approx(whole[2:], abs=2e-2)  # bf16, whose attention need not be deterministic


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_learn_from_exactly_their_reference(ranks, kind):
    flags = [*WIDE, "--bf16", "--lora-rank", "16", "--lora-type", kind, "--reference", "resident", "--lr", "1e-2"]
    found = losses(ranks(1)(train, [*flags, "--train-iters", "30"]))
    assert found[0] == pytest.approx(LN_2, abs=OFF_BY["--bf16"])
    assert found[-1] < 0.7 * LN_2
