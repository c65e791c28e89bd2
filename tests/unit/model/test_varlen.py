"""Torch's varlen attention as each release has it: our call is taken, and gives what attention run by run gives.

The parameters of every release are on record (``tools/torch_releases.py``). A function that takes those and no others
stands in for the kernel, which needs a GPU; what it computes is written out here: a softmax under an explicit mask.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.model import attention_backends, varlen
from megatron_bdpo.model.attention_backends import BACKENDS
from megatron_bdpo.model.attention_layer import Layer

RECORD = json.loads(Path(__file__).with_name("torch_releases.json").read_text("utf-8"))


def signature(parameters: str) -> inspect.Signature:
    """Of the text between the brackets of a definition."""
    scope: dict[str, Any] = {}
    exec(f"def function({parameters}): ...", scope)
    return inspect.signature(scope["function"])


SIGNATURES = {
    release: signature(*functions["varlen_attn"]) for release, functions in RECORD.items() if functions["varlen_attn"]
}
WITHOUT = [release for release, functions in RECORD.items() if not functions["varlen_attn"]]
if there := varlen.installed():
    SIGNATURES[f"{torch.__version__}, installed"] = inspect.signature(there.function)


def as_in(taken: inspect.Signature) -> Callable[..., torch.Tensor]:
    """A ``varlen_attn`` with these parameters."""

    def varlen_attn(*arguments: Any, **named: Any) -> torch.Tensor:
        given = taken.bind(*arguments, **named)
        given.apply_defaults()
        given = given.arguments
        if given.get("is_causal"):
            given["window_size"] = (-1, 0)
        left, right = given.get("window_size", (-1, -1))
        query, key, value = given["query"], given["key"], given["value"]
        assert value.shape == key.shape
        grouped = query.shape[1] != key.shape[1]
        assert given.get("enable_gqa", grouped) is grouped  # where there is no such parameter, the kernel groups heads
        scale = given.get("scale") or query.shape[2] ** -0.5
        starts = [given[name] for name in ("cu_seq_q", "cu_seq_k")]
        lengths = [each.diff().tolist() for each in starts]
        assert [each.dtype for each in starts] == [torch.int32] * 2
        assert given["max_q"] >= max(lengths[0]) and given["max_k"] == max(lengths[1])
        assert given["max_q"] > 1 or "is_causal" not in taken.parameters, "gradients of grouped heads would be wrong"
        out = []
        for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
            behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
            hidden = ((behind > left) & (left >= 0)) | ((behind < -right) & (right >= 0))
            scores = torch.einsum("qnd,knd->nqk", q, k) * scale
            out.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
        return torch.cat(out)

    varlen_attn.__signature__ = taken  # type: ignore[attr-defined]
    return varlen_attn


@pytest.fixture
def torch_with(monkeypatch) -> Callable[[inspect.Signature | None], None]:
    def install(taken: inspect.Signature | None) -> None:
        found = None if taken is None else varlen.Varlen.of(as_in(taken))
        monkeypatch.setattr(varlen, "installed", lambda: found)

    return install


@dataclass(frozen=True)
class Plan:
    """Runs whose queries are the last of their keys."""

    query_lengths: tuple[int, ...] = (3, 1, 4)
    key_lengths: tuple[int, ...] = (3, 6, 9)

    @property
    def query_starts(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.query_lengths)], dtype=torch.int32)

    @property
    def key_starts(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.key_lengths)], dtype=torch.int32)


HEADS, SIZE = 4, 8
USUAL = SIZE**-0.5
LAYERS = {
    "usual": Layer(SIZE, USUAL, None),
    "window": Layer(SIZE, USUAL, 2),
    "a quarter of the usual scale": Layer(SIZE, USUAL / 4, None),
    "another scale": Layer(SIZE, 0.3, None),
    "narrow values": Layer(SIZE, USUAL, None, value_size=5),
}
#: What no release can.
OTHERS = {
    "has no sinks": Layer(SIZE, USUAL, None, sinks=True),
    "does not cap scores": Layer(SIZE, USUAL, None, softcap=50.0),
}


def attend(backend: str, layer: Layer, groups: int, plan: Plan) -> list[torch.Tensor]:
    """Output and gradients of query, key and value, in fp64."""
    draw = torch.Generator().manual_seed(1)
    queries, keys = sum(plan.query_lengths), sum(plan.key_lengths)
    sizes = (queries, HEADS, SIZE), (keys, groups, SIZE), (keys, groups, layer.output_size)
    inputs = [torch.randn(*size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes]
    out = BACKENDS[backend](*inputs, plan, layer)
    out.backward(torch.randn(out.shape, generator=draw, dtype=torch.float64))
    return [out.detach(), *(each.grad for each in inputs)]


#: What a release has no parameter for, and what cannot be made of those it has without rounding.
NEEDS = {"window": "window_size", "another scale": "scale"}
CANNOT = [
    (release, name) for release, taken in SIGNATURES.items() for name in NEEDS if NEEDS[name] not in taken.parameters
]
CAN = [(release, name) for release in SIGNATURES for name in LAYERS if (release, name) not in CANNOT]


@pytest.mark.parametrize("plan", [Plan(), Plan((1, 1), (3, 5))], ids=["runs", "runs of one query"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("release", "name"), CAN)
def test_every_release_attends_as_run_by_run(torch_with, release, name, groups, plan):
    torch_with(SIGNATURES[release])
    assert attention_backends.default_backend(True, torch.bfloat16, LAYERS[name]) == "varlen"
    expected = attend("sdpa", LAYERS[name], groups, plan)
    for result, expected_result in zip(attend("varlen", LAYERS[name], groups, plan), expected, strict=True):
        torch.testing.assert_close(result, expected_result, rtol=0, atol=1e-13)  # some units of fp64


@pytest.mark.parametrize(("release", "name"), CANNOT)
def test_what_a_release_cannot_do_is_left_to_others(torch_with, monkeypatch, release, name):
    torch_with(SIGNATURES[release])
    others_are_taken(monkeypatch, LAYERS[name], r"(has no windows|scales scores by .* only) \(2\.11's ")


@pytest.mark.parametrize("release", WITHOUT)
def test_a_release_without_it(torch_with, monkeypatch, release):
    torch_with(None)
    others_are_taken(monkeypatch, LAYERS["usual"], r"has no varlen attention \(2\.11 has\)")


@pytest.mark.parametrize("size", [20, 264])
@pytest.mark.parametrize("release", SIGNATURES)
def test_head_sizes_that_the_kernel_refuses(torch_with, monkeypatch, release, size):
    torch_with(SIGNATURES[release])
    others_are_taken(monkeypatch, Layer(size, size**-0.5, None), f"takes head sizes of 8, 16, ... 256, not {size}")


@pytest.mark.parametrize("release", SIGNATURES)
def test_values_wider_than_keys_are_left_to_others(torch_with, monkeypatch, release):
    torch_with(SIGNATURES[release])
    layer = Layer(SIZE, USUAL, None, value_size=16)
    others_are_taken(monkeypatch, layer, r"takes values no wider than keys \(8\), not 16")


@pytest.mark.parametrize("has_engine", [True, False])
@pytest.mark.parametrize("reason", OTHERS)
@pytest.mark.parametrize("release", SIGNATURES)
def test_caps_and_sinks_are_computed_run_by_run(torch_with, monkeypatch, release, reason, has_engine):
    torch_with(SIGNATURES[release])
    monkeypatch.setattr(attention_backends, "_has_transformer_engine", lambda: has_engine)
    layer = OTHERS[reason]
    assert attention_backends.default_backend(True, torch.bfloat16, layer) == "sdpa"
    warning = attention_backends.why_slow("sdpa", True, torch.bfloat16, layer)
    assert reason in warning and "Install" not in warning
    for name, cause in (("varlen", reason), ("te", "Transformer Engine's attention (takes no sinks|caps no scores)")):
        with pytest.raises(UserError, match=rf"--pair-attention {name}: .*{cause}.* Leave it out"):
            attention_backends.check_backend(name, True, torch.bfloat16, layer)


def test_one_that_cannot_be_causal_is_not_used():
    assert varlen.Varlen.of(as_in(signature("query, key, value, cu_seq_q, cu_seq_k, max_q, max_k"))) is None


def others_are_taken(monkeypatch, layer: Layer, reason: str) -> None:
    for there, expected in ((True, "te"), (False, "sdpa")):
        monkeypatch.setattr(attention_backends, "_has_transformer_engine", lambda there=there: there)
        assert attention_backends.default_backend(True, torch.bfloat16, layer) == expected
        warning = attention_backends.why_slow(expected, True, torch.bfloat16, layer)
        assert bool(warning) is (expected == "sdpa")
    assert "Install Transformer Engine (pip install '.[gpu]') or a torch whose varlen attention fits" in warning
    with pytest.raises(UserError, match=rf"--pair-attention varlen: .*torch .* {reason}"):
        attention_backends.check_backend("varlen", True, torch.bfloat16, layer)


def test_what_each_release_takes():
    """The table in ``model/varlen.py``."""
    expected = {"2.10": "is_causal", "2.11": "scale window_size"}
    for release, taken in SIGNATURES.items():
        ours = {"is_causal", "scale", "window_size", "enable_gqa"} & set(taken.parameters)
        since_2_12 = "enable_gqa scale window_size"
        assert " ".join(sorted(ours)) == expected.get(".".join(release.split(".")[:2]), since_2_12), release
    assert {release.rpartition(".")[0] for release in WITHOUT} == {"2.7", "2.8", "2.9"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_power_of_two_scales_queries_without_rounding(dtype):
    query = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    scaled = varlen._times_power_of_two(query, 0.25 * (1 + 1e-9))
    assert scaled.dtype == dtype and torch.equal(scaled.double(), query.double() / 4)
    assert varlen._times_power_of_two(query, 1 - 1e-9) is query
    with pytest.raises(ValueError, match="would round them"):
        varlen._times_power_of_two(query, 0.3)


def test_matrix_products_in_fp32_need_2_8():
    """``logprobs`` asks CUDA for fp32 products of half-precision matrices."""
    for release, functions in RECORD.items():
        for name in ("mm", "addmm"):
            has = any("out_dtype" in signature(each).parameters for each in functions[name])
            assert has is (release != "2.7.1"), (release, name)
