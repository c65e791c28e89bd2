"""The Triton kernels of the log-probs against torch's operations: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_bdpo.logprobs.softmax_passes import ChunkSums, Passes, Targets, TorchPasses

pytest.importorskip("triton")

#: Triton reads it when it is imported: one process interprets all kernels or none.
INTERPRET = "TRITON_INTERPRET"

#: (positions, columns of the chunk, columns of the buffer that it is in); blocks of the kernels have 4096.
SIZES = [(5, 1, 8), (3, 100, 104), (7, 4096, 4096), (2, 9000, 9008), (0, 16, 16)]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(INTERPRET not in os.environ, reason="runs in test_interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.skipif(INTERPRET in os.environ, reason="this is the process that it starts")
def test_interpreted():
    """All tests below on the CPU."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "cpu", "-p", "no:cacheprovider"],
        env={**os.environ, INTERPRET: "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and f"{16 * len(SIZES)} passed" in ran.stdout, ran.stdout[-4000:]


@pytest.fixture
def triton_passes() -> Passes:
    from megatron_bdpo.logprobs.softmax_triton import TritonPasses

    return TritonPasses()


def chunk(size: tuple[int, int, int], device: str) -> tuple[Tensor, Targets]:
    """Logits of up to 30 with -inf among them; targets left of, in and right of the chunk, on its edges too."""
    positions, columns, width = size
    generator = torch.Generator().manual_seed(columns)
    logits = 10 * torch.randn(positions, width, generator=generator)
    if columns > 1:
        logits[:, columns // 2] = float("-inf")
    ids = torch.randint(50, 50 + 2 * columns, (positions,), generator=generator) - columns // 2
    ids[:3] = torch.tensor([100, 100 + columns - 1, 99])[:positions]
    return logits.to(device)[:, :columns], Targets(ids.to(device), 100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("asked", [(), ("moment",), ("square",), ("moment", "square")], ids=str)
@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16], ids=str)
def test_exponentials(triton_passes, device, size, asked, kept):
    logits, targets = chunk(size, device)
    found, expected = (
        run_exponentials(passes, logits.clone(), targets, asked, kept) for passes in (triton_passes, TorchPasses())
    )
    # A GPU's exp(z) is off by the rounding of z log2(e), 6e-8 of up to 90; what is kept is rounded to its type, too.
    for name, value in found.items():
        tolerance = 1e-5 + (torch.finfo(kept).eps if kept and name == "kept" else 0)
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-30, msg=f"{name}: {value}")


def run_exponentials(
    passes: Passes, logits: Tensor, targets: Targets, asked: tuple[str, ...], kept: torch.dtype | None
) -> dict[str, Tensor]:
    positions, columns = logits.shape
    maximum, total, *more = logits.new_full((4, positions), 7.0)
    moments = dict(zip(("moment", "square"), more, strict=True))
    sums = ChunkSums(maximum, total, **{name: each for name, each in moments.items() if name in asked})
    target_logit = logits.new_full((positions,), 5.0)  # stays where the target is elsewhere
    whole = None if kept is None else logits.new_zeros((positions, columns + 24), dtype=kept)
    own = None if whole is None else whole[:, 8 : 8 + columns]
    passes.exponentials(logits, targets, sums, target_logit, own)
    results = {"maximum": maximum, "total": total, "target": target_logit, **moments}
    return results if whole is None else results | {"kept": whole}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("exponentiated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(triton_passes, device, size, exponentiated, dtype):
    logits, targets = chunk(size, device)
    found, expected = (
        run_gradient(passes, logits.clone(), targets, exponentiated, dtype) for passes in (triton_passes, TorchPasses())
    )
    torch.testing.assert_close(found, expected, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-30)
    rows = torch.arange(len(found), device=device)
    column = targets.ids - targets.first
    here = (column >= 0) & (column < found.shape[1])
    assert (found[rows[here], column[here]] == 3).all()


def run_gradient(passes: Passes, logits: Tensor, targets: Targets, exponentiated: bool, dtype: torch.dtype) -> Tensor:
    """In place where what is read is in the result's type, as from a kept softmax."""
    generator = torch.Generator().manual_seed(1)
    incoming, at_target = torch.randn(len(logits), generator=generator), torch.full((len(logits),), 3.0)
    shift = -logits.amax(1).cpu() - torch.rand(len(logits), generator=generator)
    source = logits.sub(logits.amax(1)[:, None]).exp().to(dtype) if exponentiated else logits
    out = source if source.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    shift, incoming, at_target = (each.to(logits.device) for each in (shift, incoming, at_target))
    passes.gradient(source, shift, incoming, at_target, targets, out, exponentiated)
    return out
