"""FP8: what it asks of shapes and machines, and the attention that goes with it.

That the kernels compute what they should is seen on a GPU only: ``tests/gpu``.
"""

from __future__ import annotations

import pytest
import torch

from megatron_bdpo.model import attention_backends
from megatron_bdpo.model.attention_layer import Layer
from megatron_bdpo.model.precision import FP8_MULTIPLES, Precision
from tests.harness.jobs import TINY_JOB, TINY_MODEL, refusals

FP8 = "--bf16 --fp8-format hybrid --fp8-recipe"

#: Flags -> what is said of them. The model: hidden size 32, 4 heads of 8, 2 query groups, MLP 64.
REFUSED = {
    f"{FP8} tensorwise ": "there is no GPU",
    f"{FP8} delayed": "Use tensorwise or blockwise",
    "--bf16 --fp8-format hybrid": "--fp8-recipe delayed (Megatron's default): its scales are a history",
    f"--dry-run 4 {FP8} delayed": "Use tensorwise or blockwise",
    f"{FP8} tensorwise": "Transformer Engine is not installed",
    f"{FP8} blockwise": "hidden size 32 (not a multiple of 128)",
    f"{FP8} mxfp8 --tensor-model-parallel-size 4": "MLP 16 (not a multiple of 32)",
    f"{FP8} mxfp8 --tensor-model-parallel-size 2": "attention output 16 (not a multiple of 32)",
    "--fp8-format e4m3 --fp8-recipe tensorwise": "add --bf16",
    f"{FP8} custom": "what it asks of shapes is not known",
    f"{FP8} tensorwise --fp8-param-gather --reference resident": "Use --reference precomputed",
    f"{FP8} mxfp8 --num-experts 4 --moe-ffn-hidden-size 48": "expert MLP 48 (not a multiple of 32)",
    f"{FP8} blockwise --tp-comm-overlap": "Transformer Engine's buffers know no blockwise tensors",
    f"{FP8} mxfp8 --tp-comm-overlap --tensor-model-parallel-size 8": "that is a multiple of 1024",
    "--pair-attention varlen --bf16": "--pair-attention varlen: its kernels need a GPU",
    "--pair-attention te": "--pair-attention te: its kernels need a GPU",
}
ALLOWED = [
    "",
    "--bf16",
    "--pair-attention sdpa",
    f"--dry-run 4 {FP8} tensorwise",
    "--dry-run 4 --pair-attention te --bf16",
]


CHECK = "megatron_bdpo.training.flags.precision_check.check_precision"


@pytest.fixture(scope="module")
def messages(ranks) -> dict[str, str]:
    cases = [*REFUSED, *ALLOWED]
    return dict(zip(cases, ranks(1)(refusals, CHECK, [(flags, 1) for flags in cases])[0], strict=True))


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_with_the_reason(messages, flags):
    assert REFUSED[flags] in messages[flags]


@pytest.mark.parametrize("flags", ALLOWED)
def test_allowed(messages, flags):
    assert messages[flags] == ""


def length_units(all_flags: list[str]) -> list[int]:
    from megatron_bdpo.training.flags.arguments import Arguments

    return [Arguments.parse(flags.split(), TINY_MODEL | TINY_JOB).settings.length_unit for flags in all_flags]


def test_each_ranks_part_of_a_pack_is_a_multiple_of_the_recipes_tile(ranks):
    split = "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2"
    expected = {"": 8, "--bf16": 8, split: 32}
    expected |= {f"{FP8} {recipe}": multiple for recipe, multiple in FP8_MULTIPLES.items()}
    expected |= {f"{FP8} {recipe} {split}": 4 * multiple for recipe, multiple in FP8_MULTIPLES.items()}
    assert ranks(1)(length_units, list(expected))[0] == list(expected.values())


def alignment_of_megatron() -> dict[str, int]:
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    return {recipe.value: get_fp8_align_size(recipe) for recipe in Fp8Recipe}


def test_multiples_are_at_least_megatrons(ranks):
    (megatron,) = ranks(1)(alignment_of_megatron)
    for recipe, multiple in FP8_MULTIPLES.items():
        assert multiple % megatron[recipe] == 0
    assert (FP8_MULTIPLES["tensorwise"], FP8_MULTIPLES["mxfp8"]) == (megatron["tensorwise"], megatron["mxfp8"])


def test_names():
    assert str(Precision(torch.bfloat16)) == "bf16"
    assert str(Precision(torch.bfloat16, "tensorwise")) == "bf16, linear layers in FP8 (tensorwise)"


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "expected"),
    [(False, torch.bfloat16, "sdpa"), (True, torch.bfloat16, "varlen"), (True, torch.float32, "sdpa")],
)
def test_default_backend(monkeypatch, on_gpu, dtype, expected):
    """Of a torch whose varlen attention can do all; those of each release are in ``test_varlen``."""
    monkeypatch.setattr(attention_backends.varlen, "why_not", lambda *layer: "")
    assert attention_backends.default_backend(on_gpu, dtype, USUAL) == expected
    assert attention_backends.why_slow(expected, on_gpu, dtype, USUAL) == ""


USUAL = Layer(head_size=64, scale=0.125, window=None)


def described(cases: list[tuple[str, str]]) -> list[list[str]]:
    """What the log says of attention on a pretended GPU: flags, and a release of torch."""
    from megatron_bdpo.model import varlen
    from megatron_bdpo.platform import cpu
    from megatron_bdpo.training.flags import precision_check
    from megatron_bdpo.training.flags.arguments import Arguments
    from tests.unit.model.test_varlen import SIGNATURES, as_in

    told = []
    for flags, release in cases:
        arguments = Arguments.parse(flags.split(), TINY_MODEL | TINY_JOB)
        attend = varlen.Varlen.of(as_in(SIGNATURES[release])) if release in SIGNATURES else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "is_active", lambda: False)
            patch.setattr(varlen, "installed", lambda attend=attend: attend)
            told.append(list(precision_check.describe(arguments.settings))[1:])
    return told


VARLEN, RUN_BY_RUN = (attention_backends.DESCRIPTIONS[name] for name in ("varlen", "sdpa"))
WINDOWS = "--window-size 4,0 --window-attn-skip-freq 2"

#: Flags and release -> what computes attention, and whether there is a warning.
TOLD = {
    ("--bf16", "2.12.0"): (VARLEN, False),
    (f"--bf16 {WINDOWS}", "2.11.0"): (VARLEN, False),
    ("--bf16", "2.10.0"): (VARLEN, False),
    (f"--bf16 {WINDOWS}", "2.10.0"): (f"{VARLEN}; in layers with a window {RUN_BY_RUN}", True),
    ("--bf16", "2.9.1"): (RUN_BY_RUN, True),
    (f"--bf16 {WINDOWS}", "2.9.1"): (RUN_BY_RUN, True),
    ("--bf16 --softmax-type learnable", "2.12.0"): (RUN_BY_RUN, True),
    ("--bf16 --pair-attention sdpa", "2.9.1"): (RUN_BY_RUN, False),
    ("", "2.9.1"): (RUN_BY_RUN, False),
}


def test_the_log_says_what_computes_attention(ranks):
    for case, (attention, *warning) in zip(TOLD, ranks(1)(described, list(TOLD))[0], strict=True):
        expected_attention, is_slow = TOLD[case]
        assert attention == f"attention: {expected_attention}", case
        assert len(warning) == is_slow, case
        advice = "Shorter packs (--seq-length) take less" if "softmax-type" in case[0] else "Install Transformer Engine"
        assert all(each.startswith("warning: ") and advice in each for each in warning)


def backends_in_a_model(flags: list[str]) -> set[str | None]:
    from megatron_bdpo.model.attention import PairAttention
    from megatron_bdpo.training.callbacks.callback import Callback, Start
    from tests.harness.jobs import run_job

    found: set[str | None] = set()

    class Looking(Callback):
        def after_load(self, start: Start) -> None:
            modules = (module for chunk in start.model for module in chunk.modules())
            found.update(module.backend for module in modules if isinstance(module, PairAttention))

    run_job(["--train-iters", "1", *flags], {}, [Looking()])
    return found


def test_the_flag_reaches_every_layer(ranks):
    assert ranks(1)(backends_in_a_model, ["--pair-attention", "sdpa"])[0] == {"sdpa"}
    assert ranks(1)(backends_in_a_model, [])[0] == {None}
