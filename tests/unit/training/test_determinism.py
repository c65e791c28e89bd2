"""``--deterministic-mode``: its environment before the ranks meet, and which kernel of torch's attention it reaches."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types

import pytest
import torch

from tests.unit.training.test_dry_run import ROOT

START = """
import os, sys
from megatron_bdpo.training import distributed, entry
def process_groups(process):
    print({name: os.environ.get(name) for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG")}, flush=True)
    sys.exit(3)
distributed.process_groups = process_groups
entry.main(sys.argv[1:])
"""


def started(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A training run, as far as its process groups."""
    cleared = {name: value for name, value in os.environ.items() if name not in ("NCCL_ALGO",)}
    command = [sys.executable, "-c", START, "--recipe", str(ROOT / "recipes" / "tiny.yaml"), *flags]
    variables = cleared | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def test_the_environment_is_settled_before_nccl_reads_it():
    assert "{'NCCL_ALGO': 'Ring', 'CUBLAS_WORKSPACE_CONFIG': ':4096:8'}" in started("--deterministic-mode").stdout
    assert "{'NCCL_ALGO': None" in started().stdout


def test_an_environment_that_contradicts_is_refused():
    ended = started("--deterministic-mode", NCCL_ALGO="Tree")
    assert ended.returncode == 2
    assert "error: --deterministic-mode: the environment contradicts it (NCCL_ALGO='Tree'" in ended.stderr
    assert "Unset the variable, or leave the flag out" in ended.stderr


varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch < 2.10 has no varlen attention")


def test_varlen_attention_of_pairs_is_never_cudnns(monkeypatch):
    """cuDNN's has no deterministic backward. Up to 2.13 none is taken; from 2.14 on none for a causal window."""
    if not hasattr(varlen, "_can_use_cudnn"):
        assert varlen._should_use_cudnn(0) is False
        return
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda device: True)  # as on an H100
    query = types.SimpleNamespace(
        is_cuda=True,
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        shape=(512, 8, 128),
        size=(512, 8, 128).__getitem__,
    )
    assert varlen._can_use_cudnn(query, query, query, 512, [-1, -1]), "the stand-in is one that it would be taken for"
    assert not varlen._can_use_cudnn(query, query, query, 512, [-1, 0])


def test_varlen_attention_goes_backward_by_the_kernel_that_asks_for_determinism():
    """``aten::_flash_attention_backward`` reads torch's switch (its source, attention_backward.cu, up to 2.14)."""
    assert "torch.ops.aten._flash_attention_backward(" in inspect.getsource(varlen)


def test_what_the_package_calls_on_a_gpu_torch_makes_deterministic():
    """By torch's own list: gathered keys, scored positions, the target's column, sums by sequence."""
    makes, _, throws = (torch.use_deterministic_algorithms.__doc__ or "").partition("operations will throw a")
    for name in ("index_add", "index_select", "scatter_add_", "index_put", "gather"):
        assert f"{name}`" in makes, name
    used = (ROOT / "megatron_bdpo" / "logprobs").rglob("*.py"), (ROOT / "megatron_bdpo" / "model").glob("*.py")
    calls = "\n".join(path.read_text("utf-8") for paths in used for path in paths)
    for name in ("histc", "kthvalue", "bincount", "put_(", "NLLLoss", "cross_entropy(", "grid_sample", "resize_"):
        assert f".{name}" not in calls.replace("vocab_parallel_cross_entropy(", ""), f"{name} throws or varies"
    assert "cumsum" in throws and calls.count("cumsum") == 1, "of integers, which is exact"
