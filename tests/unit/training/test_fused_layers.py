"""The functions that torch.compile fuses in local layers equal the eager ones, here by a C++ compiler on the CPU."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.harness.jobs import refusals

IN_A_PROCESS = "from tests.unit.training import test_fused_layers as t; import json"
SETTLE = "megatron_bdpo.training.flags.fused_layers.fusion_arguments"

#: fp32: a fused kernel rounds its last result only, an eager one each of some ten.
ALLOWED = 1e-5


def rotary(fused: bool) -> Callable[..., Tensor]:
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_bdpo.platform.compilation import fuse_rotary_embedding

    fuse_rotary_embedding(fused)
    return rope_utils._apply_rotary_pos_emb_bshd


def norm(fused: bool) -> Callable[..., Tensor]:
    from megatron_bdpo.model.norm import ZeroCenteredRMSNorm

    module = ZeroCenteredRMSNorm(16, 1e-5)
    if fused:
        module.compile(dynamic=True)

    def with_weight(hidden: Tensor, weight: Tensor) -> Tensor:
        module.weight = torch.nn.Parameter(weight.detach().clone())
        return module(hidden)

    return with_weight


def swiglu(fused: bool) -> Callable[..., Tensor]:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    def eager(gates: Tensor) -> Tensor:
        gate, value = gates.chunk(2, dim=-1)
        return functional.silu(gate) * value

    return (lambda gates: bias_swiglu_impl(gates, None)) if fused else eager


def residual(fused: bool) -> Callable[..., Tensor]:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    add = get_bias_dropout_add(True, fused)
    return lambda hidden, residual: add((hidden, None), residual, 0.0)


#: What is fused, and inputs of it for packs of so many positions. Those that come first have gradients.
CASES: dict[str, tuple[Callable[[bool], Callable[..., Tensor]], Callable[[int], list[Tensor]]]] = {
    "rotary embedding, queries": (rotary, lambda t: [torch.randn(t, 1, 4, 16), torch.randn(t, 1, 1, 16)]),
    "rotary embedding, keys": (rotary, lambda t: [torch.randn(t, 1, 2, 16), torch.randn(t, 1, 1, 16)]),
    "zero-centered norm": (norm, lambda t: [torch.randn(t, 1, 16), torch.randn(16)]),
    "SwiGLU": (swiglu, lambda t: [torch.randn(t, 1, 48)]),
    "dropout and residual": (residual, lambda t: [torch.randn(t, 1, 16), torch.randn(t, 1, 16)]),
}


def deviations() -> dict[str, float]:
    """Of values and of the first input's gradient, at the worst of packs of three lengths."""
    torch.manual_seed(1)
    found: dict[str, float] = {}
    for name, (make, inputs) in CASES.items():
        eager, fused = make(False), make(True)
        for positions in (24, 40, 64):
            parts = inputs(positions)
            outcomes = [value_and_gradient(function, parts) for function in (eager, fused)]
            apart = max(float((one - other).abs().max()) for one, other in zip(*outcomes, strict=True))
            found[name] = max(found.get(name, 0.0), apart)
    return found


def value_and_gradient(function: Callable[..., Tensor], parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = parts[0].clone().requires_grad_()
    out = function(first, *parts[1:])
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    assert first.grad is not None
    return out.detach(), first.grad


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.skipif(" " in torch.__file__, reason="torch hands its own path to the compiler without quotes")
def test_fused_functions_equal_the_eager_ones():
    """In a process of its own: where a GPU is emulated, nothing is compiled."""
    code = f"{IN_A_PROCESS}; print(json.dumps([t.deviations(), t.graphs()]))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found, graphs = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == CASES.keys()
    assert all(0 <= apart <= ALLOWED for apart in found.values()), found
    assert 0 < graphs <= 2 * len(CASES), "nothing has been compiled, or anew for every length"


def graphs() -> int:
    """That torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def test_rotary_embedding_compiles_no_kernel_for_the_cpu():
    """Its graphs take tensors and sizes: a number would be a tensor on the CPU, with a C++ kernel of its own."""
    code = f"{IN_A_PROCESS}; print(json.dumps(t.inputs_without_dimensions()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == [0, 0]


def inputs_without_dimensions() -> list[int]:
    """Tensors of no dimension that each compiled graph of the rotary embedding takes."""
    found = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(sum(isinstance(each, Tensor) and each.ndim == 0 for each in inputs))
        return graph

    compile_counted = functools.partial(torch.compile, backend=count)
    with mock.patch.object(torch, "compile", compile_counted):
        function = rotary(True)
    for gradient in (False, True):
        function(torch.randn(8, 1, 4, 16, requires_grad=gradient), torch.randn(8, 1, 1, 16), mscale=1.1)
    return found


def settled(flags: str) -> dict[str, Any]:
    """What the fusions' arguments are on a GPU, by this rank's parser; the GPU is made up."""
    from megatron_bdpo.training.flags import fused_layers
    from megatron_bdpo.training.flags.arguments import Arguments

    arguments = Arguments.parse(flags.split())
    with (
        mock.patch.object(fused_layers.cpu, "is_active", lambda: False),
        mock.patch.object(fused_layers.importlib.util, "find_spec", lambda name: object()),
    ):
        arguments.set(**fused_layers.fusion_arguments(arguments.settings))
        (line,) = fused_layers.describe(arguments.settings)
    names = ("fuse_local_layers", "bias_swiglu_fusion", "bias_dropout_fusion")
    return {name: vars(arguments.megatron)[name] for name in names} | {"line": line}


def test_on_a_gpu_they_are_on_unless_told_otherwise(ranks):
    (found,) = ranks(1)(settled, "--transformer-impl local --swiglu")
    assert found == {
        "fuse_local_layers": True,
        "bias_swiglu_fusion": True,
        "bias_dropout_fusion": True,
        "line": "layers: Megatron's local ones; torch.compile fuses rotary embedding, SwiGLU, dropout and residual",
    }
    (found,) = ranks(1)(settled, "--transformer-impl local --swiglu --no-bias-swiglu-fusion")
    assert (found["bias_swiglu_fusion"], found["bias_dropout_fusion"]) == (False, True)
    (found,) = ranks(1)(settled, "--transformer-impl local --no-fuse-local-layers")
    assert found["fuse_local_layers"] is False
    assert found["line"] == "layers: Megatron's local ones, not fused (--no-fuse-local-layers)"


def test_what_cannot_be_fused_is_refused(ranks):
    jobs = [("", 1), ("--no-fuse-local-layers", 1), ("--fuse-local-layers", 1)]
    jobs.append(("--fuse-local-layers --transformer-impl transformer_engine", 1))
    (found,) = ranks(1)(refusals, SETTLE, jobs)
    assert found[:2] == ["", ""]
    assert found[2] == "--fuse-local-layers: there is no GPU. Leave it out: it is on where it works."
    assert "Transformer Engine's layers are fused kernels" in found[3]
