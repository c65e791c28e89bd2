"""Pair attention against a dense softmax under an explicit mask, value and gradient.

The module runs on a rank of a pool: without a GPU it needs the emulation, which shall not be in force in this process.
The dense softmax runs here, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_bdpo.data.packs import Group, Pack, lay_out


def pack_of(lengths: list[tuple[int, int, int]], padding: int = 0, share: bool = True) -> Pack:
    """Pairs with these lengths of prompt, chosen and rejected; token ids do not matter here."""
    groups = [Group(np.zeros(n, np.int32), [np.zeros(each, np.int32) for each in answers]) for n, *answers in lengths]
    used = sum((1 if share else 2) * prompt + chosen + rejected for prompt, chosen, rejected in lengths)
    return lay_out(groups, used + padding, share_prompts=share)


@dataclass(frozen=True)
class Case:
    """A pack and the attention over it: n query heads, g key/value heads, d head size of keys and e of values."""

    pack: Pack
    heads: int = 4
    groups: int = 2
    head_size: int = 8
    value_size: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: str = "vanilla"
    layer_scaling: bool = False
    layer: int = 3

    @property
    def scale(self) -> float:
        """Megatron's scaling by layer takes back in the softmax what it does to the scores."""
        return self.head_size**-0.5

    def inputs(self) -> dict[str, torch.Tensor]:
        """Query, key, value and the gradient that comes in, over all T positions, padding too; sinks. float64."""
        draw = torch.Generator().manual_seed(1)
        length, width = len(self.pack.tokens), self.value_size or self.head_size
        shapes = {
            "query": (length, self.heads, self.head_size),
            "key": (length, self.groups, self.head_size),
            "value": (length, self.groups, width),
            "gradient": (length, self.heads * width),
            "sinks": (self.heads,),
        }
        inputs = {name: torch.randn(*shape, generator=draw).double() for name, shape in shapes.items()}
        return inputs | ({"sinks": torch.zeros(self.heads).double()} if self.sinks == "off-by-one" else {})


PACK = pack_of([(5, 3, 4), (1, 1, 2), (2, 6, 1)], padding=3)

CASES = {
    "grouped queries": Case(PACK),
    "all heads their own": Case(PACK, groups=4),
    "one key head": Case(PACK, groups=1),
    "window": Case(PACK, window=2),
    "window wider than everything": Case(PACK, window=100),
    "narrow values": Case(PACK, value_size=4),
    "wide values": Case(PACK, groups=1, value_size=12),
    "capped scores": Case(PACK, softcap=0.5),
    "capped scores in a window": Case(PACK, softcap=0.5, window=2),
    "sinks": Case(PACK, sinks="learnable"),
    "sinks at zero": Case(PACK, sinks="off-by-one"),
    "sinks, a window, a cap, narrow values": Case(PACK, 6, 3, value_size=4, window=2, softcap=2.0, sinks="learnable"),
    "sinks, only padding": Case(pack_of([], padding=8), sinks="learnable", value_size=4),
    "scores scaled by layer": Case(PACK, layer_scaling=True),
    "prompts not shared": Case(pack_of([(5, 3, 4), (1, 1, 2)], padding=3, share=False)),
    "runs of one token": Case(pack_of([(1, 1, 1), (1, 1, 1)], padding=2)),
    "no padding": Case(pack_of([(3, 2, 2)])),
    "only padding": Case(pack_of([], padding=8)),
}


def dense(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The definition, in fp64: softmax over the keys that each position may see; nothing for padding."""
    names = ("query", "key", "value", "sinks")
    query, key, value, sinks = (inputs[name].double().clone().requires_grad_() for name in names)
    repeats = case.heads // case.groups
    keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, keys) * case.scale
    mask = torch.from_numpy(visible(case.pack, case.window))
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    powers = torch.where(mask, scores.exp(), 0)
    total = powers.sum(dim=-1, keepdim=True)
    if case.sinks != "vanilla":
        total = total + sinks.exp()[:, None, None]
    weights = powers / torch.where(mask.any(dim=-1, keepdim=True), total, 1)  # rows that see nothing are 0, not NaN
    out = torch.einsum("nqk,knd->qnd", weights, values).flatten(1)
    out.backward(inputs["gradient"].double())
    results = {"out": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
    if case.sinks == "learnable":
        results["sinks"] = torch.zeros_like(sinks) if sinks.grad is None else sinks.grad
    return results


def visible(pack: Pack, window: int | None) -> np.ndarray:
    """[T, T], True where a position may see another: its run's keys up to itself, not further back than the window."""
    mask = np.zeros((len(pack.tokens), len(pack.tokens)), bool)
    query_starts, key_starts = np.cumsum([0, *pack.query_lengths]), np.cumsum([0, *pack.key_lengths])
    for run, first in enumerate(query_starts[:-1]):
        keys = pack.key_index[key_starts[run] : key_starts[run + 1]]
        for query in range(first, query_starts[run + 1]):
            distance = pack.positions[query] - pack.positions[keys]
            mask[query, keys] = (distance >= 0) & (distance <= (len(mask) if window is None else window))
    return mask


def attend(
    case: Case, inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: str = "cpu", backend: str | None = None
) -> dict[str, torch.Tensor]:
    """PairAttention's output and gradients, as float64 on the CPU."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_bdpo.model.attention import PairAttention
    from megatron_bdpo.training.batches import to_batch

    config = TransformerConfig(
        num_layers=4,
        hidden_size=case.heads * case.head_size,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        kv_channels=case.head_size,
        window_size=None if case.window is None else (case.window, 0),
        apply_query_key_layer_scaling=case.layer_scaling,
        attention_softmax_in_fp32=case.layer_scaling,
        softmax_type=case.sinks,
        params_dtype=dtype,
    )
    module = PairAttention(config, case.layer, AttnMaskType.causal, "self")
    module.backend, module.softcap = backend, case.softcap
    moved = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    if case.sinks == "learnable":
        with torch.no_grad():
            module.softmax_offset.copy_(moved["sinks"])
    query, key, value = (moved[name][:, None].clone().requires_grad_() for name in ("query", "key", "value"))
    batch = to_batch(case.pack, len(case.pack.tokens), len(case.pack.tokens))
    batch = batch.to_device() if device == "cuda" else batch
    out = module(query, key, value, None, packed_seq_params=batch.attention)
    assert out.dtype == dtype
    out.backward(moved["gradient"][:, None])
    results = {"out": out, "query": query.grad, "key": key.grad, "value": value.grad}
    found = {
        name: (torch.zeros_like(moved[name]) if tensor is None else tensor.detach()[:, 0]).double().cpu()
        for name, tensor in results.items()
    }
    if case.sinks == "learnable":
        found["sinks"] = module.softmax_offset.grad.double().cpu()
    return found


def attend_all(dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    return {name: attend(case, case.inputs(), dtype) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def on_cpu(ranks) -> dict[torch.dtype, dict[str, dict[str, torch.Tensor]]]:
    """Results by dtype and case, from one visit to the rank."""
    return {dtype: ranks(1)(attend_all, dtype)[0] for dtype in (torch.float64, torch.float32)}


# A softmax over at most 12 keys of sums over 8 products: a few units in the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
def test_equals_a_dense_softmax(on_cpu, name, dtype):
    expected = dense(CASES[name], CASES[name].inputs())
    for what, expected_value in expected.items():
        torch.testing.assert_close(on_cpu[dtype][name][what], expected_value, rtol=0, atol=TOLERANCE[dtype], msg=what)


@pytest.mark.parametrize("name", ["grouped queries", "window", "only padding"])
def test_padding_yields_zeros_and_gets_no_gradient(on_cpu, name):
    used = CASES[name].pack.used
    for what, value in on_cpu[torch.float32][name].items():
        assert not value[used:].any(), what


def test_a_branch_does_not_feel_its_sibling(on_cpu, ranks):
    """Change the chosen answers of the pack: rejected answers and prompts stay the same to the bit."""
    case = CASES["grouped queries"]
    inputs = case.inputs()
    chosen = np.concatenate([np.arange(5, 8), [13], np.arange(18, 24)])  # of PACK
    for name in ("query", "key", "value"):
        inputs[name][chosen] += 1
    changed = ranks(1)(attend, case, inputs, torch.float64)[0]["out"]
    before = on_cpu[torch.float64]["grouped queries"]["out"]
    others = np.setdiff1d(np.arange(case.pack.used), chosen)
    assert torch.equal(changed[others], before[others])
    assert (changed[chosen] != before[chosen]).any(dim=1).all()


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (8, 8)], ids=str)
def test_keys_and_values_of_all_context_parallel_ranks(ranks, sizes):
    """Of two sizes, and each rank's gradient is that of its own positions."""
    found = ranks(2)(gathered, *sizes)
    for rank, (keys, values, of_key, of_value) in enumerate(found):
        assert keys.shape == (6, 2, sizes[0]) and values.shape == (6, 2, sizes[1])
        assert torch.equal(keys[:, 0, 0], torch.tensor([0.0, 1, 2, 10, 11, 12]))
        assert torch.equal(values, -keys[..., :1].expand(values.shape))
        assert torch.equal(of_key, torch.full((3, 1, 2, sizes[0]), 2.0)), rank
        assert torch.equal(of_value, torch.full((3, 1, 2, sizes[1]), 6.0)), rank


def gathered(key_size: int, value_size: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of both ranks, and the gradients that this one's get."""
    from types import SimpleNamespace

    from megatron.core.transformer import TransformerConfig

    from megatron_bdpo.model.attention import PairAttention
    from tests.harness.log_probs import tensor_parallel_group

    with tensor_parallel_group(2) as group:
        config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
        module = PairAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group, tp=None))
        rows = (torch.arange(3.0) + 10 * group.rank()).view(3, 1, 1, 1)
        key = rows.expand(3, 1, 2, key_size).clone().requires_grad_()
        value = (-rows).expand(3, 1, 2, value_size).clone().requires_grad_()
        keys, values = module._of_all_ranks(key, value)
        (keys.sum() + 3 * values.sum()).backward()
    return keys.detach(), values.detach(), key.grad, value.grad


def test_a_plan_is_required(ranks):
    (message,) = ranks(1)(attend_without_plan)
    assert "PairAttention needs an AttentionPlan" in message


def attend_without_plan() -> str:
    from megatron.core.transformer import TransformerConfig

    from megatron_bdpo.model.attention import PairAttention

    tensor = torch.zeros(4, 1, 2, 8)
    module = PairAttention(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2), 1, None, "self")
    try:
        module(tensor, tensor, tensor, None)
    except TypeError as error:
        return str(error)
    return "no error"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_dense_softmax_on_a_gpu(name, dtype):
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    case = Case(**{**vars(CASES[name]), "head_size": 64})
    inputs = {name: tensor.to(dtype).double() for name, tensor in case.inputs().items()}
    expected = dense(case, inputs)
    # The kernel rounds the softmax weights and its results to the input's precision; gradients add up to 12 such terms.
    unit = max(torch.finfo(dtype).eps, TOLERANCE[torch.float32] / 4)
    for what, value in attend(case, inputs, dtype, device="cuda").items():
        scale = expected[what].abs().max().item() if expected[what].numel() else 0.0
        torch.testing.assert_close(value, expected[what], rtol=0, atol=4 * unit * max(scale, 1.0), msg=what)
