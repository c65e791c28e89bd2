"""FP8: what it asks of shapes and machines, what it may not leave behind, and the attention that goes with it.

That the kernels compute what they should is seen on a GPU only: ``tests/gpu``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bdpo.model import attention_backends
from megatron_bdpo.model.precision import FP8_MULTIPLES, Precision, quantisation_history_kept
from tests.harness.jobs import TINY_JOB, TINY_MODEL, refusals

FP8 = "--bf16 --fp8-format hybrid --fp8-recipe"

#: Flags -> what is said of them. The model: hidden size 32, 4 heads of 8, 2 query groups, MLP 64.
REFUSED = {
    f"{FP8} delayed": "there is no GPU",
    f"{FP8} tensorwise": "Transformer Engine is not installed",
    f"{FP8} blockwise": "hidden size 32 (not a multiple of 128)",
    f"{FP8} mxfp8 --tensor-model-parallel-size 4": "MLP 16 (not a multiple of 32)",
    f"{FP8} mxfp8 --tensor-model-parallel-size 2": "attention output 16 (not a multiple of 32)",
    "--fp8-format e4m3 --fp8-recipe delayed": "add --bf16",
    f"{FP8} custom": "what it asks of shapes is not known",
    f"{FP8} delayed --fp8-param-gather --reference resident": "Use --reference precomputed",
    f"{FP8} mxfp8 --num-experts 4 --moe-ffn-hidden-size 48": "expert MLP 48 (not a multiple of 32)",
    "--pair-attention varlen --bf16": "--pair-attention varlen: its kernels need a GPU",
    "--pair-attention te": "--pair-attention te: its kernels need a GPU",
}
ALLOWED = [
    "",
    "--bf16",
    "--pair-attention sdpa",
    f"--dry-run 4 {FP8} delayed",
    "--dry-run 4 --pair-attention te --bf16",
]


CHECK = "megatron_bdpo.training.flags.precision.check_precision"


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
    from megatron_bdpo.training.flags import arguments
    from megatron_bdpo.training.job import length_unit

    return [length_unit(arguments.parse(flags.split(), TINY_MODEL | TINY_JOB)) for flags in all_flags]


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
    assert (FP8_MULTIPLES["delayed"], FP8_MULTIPLES["mxfp8"]) == (megatron["delayed"], megatron["mxfp8"])


def test_names():
    assert str(Precision(torch.bfloat16)) == "bf16"
    assert str(Precision(torch.bfloat16, "delayed")) == "bf16, linear layers in FP8 (delayed)"


class QuantisedLinear(torch.nn.Linear):
    """Keeps maxima and scales where Transformer Engine's modules keep them, and as they do: from its first pass on."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.fp8_meta: dict[str, Any] = {"recipe": object()}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        meta = self.fp8_meta.setdefault(
            "scaling_fwd", SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))
        )
        meta.amax_history[0, 0] = max(meta.amax_history[0, 0], hidden.abs().max())
        meta.scale[0] = 448 / meta.amax_history.max()
        return super().forward(hidden)


def state(model: torch.nn.Module) -> list[torch.Tensor]:
    metas = [module.fp8_meta["scaling_fwd"] for module in model.modules() if hasattr(module, "fp8_meta")]
    return [tensor.clone() for meta in metas for tensor in (meta.scale, meta.amax_history)]


def test_scoring_leaves_no_trace_in_the_scales():
    model = torch.nn.Sequential(QuantisedLinear(4), torch.nn.ReLU(), QuantisedLinear(4))
    model(torch.ones(2, 4))
    expected = state(model)
    with quantisation_history_kept([model]):
        model(100 * torch.ones(2, 4))
        assert not all(map(torch.equal, state(model), expected)), "the stand-in records"
    assert all(map(torch.equal, state(model), expected))


def test_scoring_before_the_first_step_leaves_fresh_scales():
    model = torch.nn.Sequential(QuantisedLinear(4))
    with quantisation_history_kept([model]):
        model(100 * torch.ones(2, 4))
    scale, history = state(model)
    assert torch.equal(scale, torch.ones(3)) and not history.any()


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "expected"),
    [(False, torch.bfloat16, "sdpa"), (True, torch.bfloat16, "varlen"), (True, torch.float32, "sdpa")],
)
def test_default_backend(monkeypatch, on_gpu, dtype, expected):
    """Of a torch whose varlen attention can do all; those of each release are in ``test_varlen``."""
    monkeypatch.setattr(attention_backends.varlen, "why_not", lambda *layer: "")
    assert attention_backends.default_backend(on_gpu, dtype, USUAL) == expected
    assert attention_backends.why_slow(expected, on_gpu, dtype, USUAL) == ""


USUAL = attention_backends.Layer(head_size=64, scale=0.125, window=None)


def described(cases: list[tuple[str, str]]) -> list[list[str]]:
    """What the log says of attention on a pretended GPU: flags, and a release of torch."""
    from megatron_bdpo.model import varlen
    from megatron_bdpo.platform import cpu
    from megatron_bdpo.training.flags import arguments, precision
    from tests.unit.test_varlen import SIGNATURES, as_in

    told = []
    for flags, release in cases:
        args = arguments.parse(flags.split(), TINY_MODEL | TINY_JOB)
        attend = varlen.Varlen.of(as_in(SIGNATURES[release])) if release in SIGNATURES else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "is_active", lambda: False)
            patch.setattr(varlen, "installed", lambda attend=attend: attend)
            told.append(list(precision.describe(args))[1:])
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
    ("--bf16 --pair-attention sdpa", "2.9.1"): (RUN_BY_RUN, False),
    ("", "2.9.1"): (RUN_BY_RUN, False),
}


def test_the_log_says_what_computes_attention(ranks):
    for case, (attention, *warning) in zip(TOLD, ranks(1)(described, list(TOLD))[0], strict=True):
        expected_attention, is_slow = TOLD[case]
        assert attention == f"attention: {expected_attention}", case
        assert len(warning) == is_slow, case
        assert all(each.startswith("warning: ") and "Install Transformer Engine" in each for each in warning)


def backends_in_a_model(flags: list[str]) -> set[str | None]:
    from megatron_bdpo.model.attention import PairAttention
    from tests.harness.jobs import last_weights_kept, run_job

    class Looking(last_weights_kept()):
        def after_load(self, model):
            super().after_load(model)
            self.found = {m.backend for chunk in model for m in chunk.modules() if isinstance(m, PairAttention)}

    run, _ = run_job(Looking, ["--train-iters", "1", *flags], {})
    return run.found


def test_the_flag_reaches_every_layer(ranks):
    assert ranks(1)(backends_in_a_model, ["--pair-attention", "sdpa"])[0] == {"sdpa"}
    assert ranks(1)(backends_in_a_model, [])[0] == {None}
