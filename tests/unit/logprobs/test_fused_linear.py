"""What the fused log-probs make, keep and hand over; that they are right is in tests/distributed/test_logprobs.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bdpo.logprobs import OneRank, ScoredPositions, TokenScores
from megatron_bdpo.logprobs.fused_linear import CHUNK_BYTES, KEPT_BYTES, default_chunk_size, token_log_probs
from megatron_bdpo.planning import memory as planning

N, V, H, CHUNK = 96, 160, 8, 32


@dataclass
class Inputs:
    """N scored positions of N hidden states, on one rank."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    incoming: Tensor

    def score(self, **options: Any) -> TokenScores:
        nothing = torch.zeros(0, dtype=torch.int64)
        index = torch.arange(len(self.target), device=self.target.device)
        scored = ScoredPositions(index, self.target, nothing, nothing, longest=0)
        options = {"vocab_size": len(self.weight), "chunk_size": CHUNK} | options
        return token_log_probs(
            self.hidden[:, None], self.weight, None, scored, tp_group=OneRank(), sequence_parallel=False, **options
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, gradient of the hidden states, gradient of the weight, in fp64."""
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (self.hidden, self.weight))
        log_probs = (hidden @ weight.t()).log_softmax(-1).gather(1, self.target[:, None]).squeeze(1)
        log_probs.backward(self.incoming.double())
        return log_probs.detach(), hidden.grad, weight.grad


def make_inputs(n: int = N, v: int = V, h: int = H, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator, device=device) for size in ((n, h), (v, h)))
    target = torch.randint(0, v, (n,), generator=generator, device=device)
    incoming = torch.rand(n, generator=generator, device=device)
    return Inputs(hidden.to(dtype).requires_grad_(), (weight / h**0.5).to(dtype).requires_grad_(), target, incoming)


@dataclass
class Recorder(TorchDispatchMode):
    """Counts operations and remembers the size of the largest tensor that one has made."""

    operations: Counter[str] = field(default_factory=Counter)
    largest: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


def saved_elements(run: Any) -> list[int]:
    """Sizes of the tensors that autograd keeps while ``run`` goes."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return kept


# Memory and work


@pytest.mark.parametrize("entropy", [False, True])
def test_no_tensor_holds_the_logits_of_more_than_a_chunk_if_none_may_be_kept(entropy):
    inputs = make_inputs()
    with Recorder() as recorder:
        inputs.score(entropy=entropy, kept_bytes=0).log_probs.backward(inputs.incoming)
    assert recorder.largest == N * CHUNK
    assert recorder.operations["mm"] == 2 * V // CHUNK  # logits, forward and backward


def test_logits_are_made_once_where_their_softmax_is_kept():
    inputs = make_inputs()
    with Recorder() as recorder:
        inputs.score().log_probs.backward(inputs.incoming)
    assert recorder.operations["mm"] == V // CHUNK
    assert recorder.operations["addmm_"] == 2  # the gradients, of all chunks at once


#: By ``kept_bytes``: index; hidden, weight, target, log-probs, log-sum-exp; the softmax and its chunks' maxima.
KEPT = {0: [N, N * H, V * H, N, N, N], N * V * 4: [N, N * H, V * H, N, N, N, N * V, N * (V // CHUNK)]}


@pytest.mark.parametrize("bound", KEPT)
def test_what_is_kept_for_backward(bound):
    inputs = make_inputs()
    assert sorted(saved_elements(lambda: inputs.score(kept_bytes=bound))) == sorted(KEPT[bound])
    assert sorted(saved_elements(lambda: inputs.score(kept_bytes=bound - 1))) == sorted(KEPT[0])


def test_bound_counts_bytes_of_the_inputs_type():
    inputs, bound = make_inputs(dtype=torch.bfloat16), N * V * 2
    assert sorted(saved_elements(lambda: inputs.score(kept_bytes=bound))) == sorted(KEPT[N * V * 4])
    assert sorted(saved_elements(lambda: inputs.score(kept_bytes=bound - 1))) == sorted(KEPT[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_kept_softmax_is_used_once(device):
    """It becomes the gradient, in its place: a second backward pass is refused, not wrong."""
    inputs = make_inputs(device=device)
    log_probs = inputs.score().log_probs
    log_probs.backward(inputs.incoming, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.backward(inputs.incoming)


def test_nothing_is_kept_when_scoring_a_reference():
    inputs = make_inputs()

    def score() -> None:
        with torch.no_grad():
            assert not inputs.score(entropy=True).log_probs.requires_grad

    assert saved_elements(score) == []
    with Recorder() as recorder:
        score()
    assert recorder.largest == N * CHUNK, "a softmax is made that nobody will read"


#: By ``kept_bytes``: products that add to a gradient.
PRODUCTS = {0: V // CHUNK, KEPT_BYTES: 1}


@pytest.mark.parametrize("bound", PRODUCTS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_gradient(frozen, bound):
    inputs = make_inputs()
    getattr(inputs, frozen).requires_grad_(False)
    with Recorder() as recorder:
        inputs.score(kept_bytes=bound).log_probs.backward(inputs.incoming)
    assert recorder.operations["addmm_"] == PRODUCTS[bound]
    assert (inputs.hidden.grad is None) == (frozen == "hidden")
    assert (inputs.weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("positions", [1, 1000, 16_384])
def test_default_chunk_is_as_large_as_its_bound_allows_in_whole_tiles(positions):
    size = default_chunk_size(positions)
    assert size % 128 == 0
    assert size * positions * 4 <= CHUNK_BYTES < (size + 128) * positions * 4


@pytest.mark.parametrize("vocab", [50_257, 151_936, 130])
def test_rows_begin_at_multiples_of_8_elements(vocab):
    """Of what products read and write, 16 bytes in half precision: otherwise a GPU does them at half its speed."""
    inputs, seen = make_inputs(37, vocab, 8), []

    class Strides(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "addmm_"):
                seen.extend(each for each in [*args, *(kwargs or {}).values()] if isinstance(each, Tensor))
            return func(*args, **(kwargs or {}))

    for bound in (0, KEPT_BYTES):
        with Strides():
            inputs.score(chunk_size=None, kept_bytes=bound).log_probs.backward(inputs.incoming)
    assert len(seen) >= 12
    for each in seen:
        assert max(each.stride()) % 8 == 0 and each.storage_offset() % 8 == 0, (each.shape, each.stride())


@pytest.mark.parametrize("positions", [0, CHUNK_BYTES])
def test_default_chunk_is_never_empty(positions):
    assert default_chunk_size(positions) >= 1


# Half precision


@pytest.mark.parametrize("bound", [0, KEPT_BYTES])
def test_hidden_gradient_adds_up_in_fp32_over_chunks(bound):
    """4096 tokens of probability 1/4096, a chunk each: a bf16 sum of their weights stands still at 1/16 of it."""
    inputs = make_inputs(4, 4096, H, torch.bfloat16)
    with torch.no_grad():
        inputs.hidden.zero_()  # every token is as likely
        inputs.weight.fill_(1)
        inputs.weight[inputs.target] = 3
    inputs.score(chunk_size=1, kept_bytes=bound).log_probs.backward(inputs.incoming)
    _, expected, _ = inputs.dense()
    # Probabilities and the result are rounded to 8 bits.
    assert (inputs.hidden.grad.double() - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("bound", [0, KEPT_BYTES])
@pytest.mark.parametrize("where", ["returned", "main_grad"])
def test_weight_gradient_adds_up_in_fp32_over_positions(where, bound):
    """4096 equal contributions: a bf16 sum stands still at 256 of them."""
    inputs = make_inputs(1, 16, H, torch.bfloat16)
    inputs = Inputs(inputs.hidden, inputs.weight, inputs.target.expand(4096), torch.ones(4096))
    inputs.hidden = inputs.hidden.detach().expand(4096, H)
    fused = where == "main_grad"
    inputs.weight.main_grad = torch.zeros(16, H)
    inputs.score(chunk_size=5, kept_bytes=bound, gradient_accumulation_fusion=fused).log_probs.backward(inputs.incoming)
    _, _, expected = inputs.dense()
    found = inputs.weight.main_grad if fused else inputs.weight.grad
    assert found.dtype == (torch.float32 if fused else torch.bfloat16)
    # The logits are rounded to 8 bits, and a returned gradient once more.
    assert (found.double() - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("bound", [0, KEPT_BYTES])
def test_gradient_at_a_nearly_certain_target_is_not_noise(bound):
    """1 - p is 0.0003 there, a tenth of what bf16 can tell 1 from."""
    inputs = make_inputs(1, 16, H, torch.bfloat16)
    with torch.no_grad():
        inputs.hidden.fill_(1)
        inputs.weight.zero_()
        inputs.weight[inputs.target] = 11 / H  # ln(15 / 0.0003) = 10.8
    inputs.score(kept_bytes=bound).log_probs.backward(inputs.incoming)
    _, _, expected = inputs.dense()
    row = inputs.target.item()
    torch.testing.assert_close(inputs.weight.grad[row].double(), expected[row], rtol=1e-2, atol=0)


# main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_goes_on_top_of_main_grad(dtype):
    """Megatron accumulates microbatches there. Autograd gets a stand-in, so that the hooks of DDP run."""
    inputs = make_inputs()
    inputs.weight.main_grad = torch.ones(V, H, dtype=dtype)
    inputs.weight.grad_added_to_main_grad = False
    for _ in range(2):
        inputs.weight.grad = None
        inputs.score(gradient_accumulation_fusion=True).log_probs.backward(inputs.incoming)
    _, _, gradient = inputs.dense()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(inputs.weight.main_grad.double(), 1 + 2 * gradient, rtol=tolerance, atol=tolerance)
    assert inputs.weight.grad_added_to_main_grad
    assert inputs.weight.grad.shape == inputs.weight.shape and inputs.weight.grad.dtype == inputs.weight.dtype


def test_stand_ins_share_their_memory():
    """They are as large as the weight, and nobody reads them."""
    seen = []
    for _ in range(2):
        inputs = make_inputs()
        inputs.weight.main_grad = torch.zeros(V, H)
        inputs.weight.grad_added_to_main_grad = False
        scores = inputs.score(gradient_accumulation_fusion=True).log_probs
        seen += torch.autograd.grad(scores, inputs.weight, inputs.incoming)
    assert seen[0].data_ptr() == seen[1].data_ptr()


def test_stand_in_is_zero_where_it_will_be_added():
    """A tied embedding's own gradient is added to the stand-in, and the sum to main_grad."""
    inputs = make_inputs()
    inputs.weight.main_grad = torch.zeros(V, H)
    inputs.weight.grad_added_to_main_grad = False
    inputs.weight.zero_out_wgrad = True
    inputs.score(gradient_accumulation_fusion=True).log_probs.backward(inputs.incoming)
    assert not inputs.weight.grad.any() and inputs.weight.main_grad.any()


def test_main_grad_is_left_alone_without_fusion():
    inputs = make_inputs()
    inputs.weight.main_grad = torch.zeros(V, H)
    inputs.score().log_probs.backward(inputs.incoming)
    _, _, expected = inputs.dense()
    torch.testing.assert_close(inputs.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert not inputs.weight.main_grad.any()


def test_planning_reckons_with_this_chunk():
    """It has numbers of its own: planning imports no torch."""
    assert planning.CHUNK_BYTES == CHUNK_BYTES
    assert planning.KEPT_BYTES == KEPT_BYTES


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [0, KEPT_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_fp64_and_keeps_to_its_bounds(dtype, bound):
    n, v = 16384, 4096
    inputs = make_inputs(n, v, 256, dtype, "cuda")
    inputs.weight.main_grad = torch.zeros(v, 256, device="cuda")
    expected = inputs.dense()
    inputs.weight.grad_added_to_main_grad = False
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs = inputs.score(chunk_size=256, gradient_accumulation_fusion=True, kept_bytes=bound).log_probs
    log_probs.backward(inputs.incoming)
    above = torch.cuda.max_memory_allocated() - before
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]  # the factors of products are rounded
    found = log_probs.detach(), inputs.hidden.grad, inputs.weight.main_grad
    for value, expected_value in zip(found, expected, strict=True):
        assert (value.double() - expected_value).abs().max() <= tolerance * expected_value.abs().max()
    kept = n * v * dtype.itemsize if bound else 0
    assert above < kept + 4 * n * v / 2  # half of the logits of all positions in fp32
