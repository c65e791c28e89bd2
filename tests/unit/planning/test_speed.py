"""The arithmetic of a step's time, done again by hand for a layer, the log-probs, a stage and a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bdpo.planning.activations import Recompute
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.machine import Machine
from megatron_bdpo.planning.memory import JobShape
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters
from megatron_bdpo.planning.search import answer
from megatron_bdpo.planning.speed import Pass, layer_passes, log_prob_passes, operations, step_time
from tests.unit.planning.test_search import LLAMA_8B, LLAMA_70B, question

H100 = Machine()
RATE = 0.6 * 989e12
NVLINK, PORT = 0.75 * 450e9, 0.85 * 50e9
LATENCY = 20e-6
ARGUMENTS = {"num_attention_heads": 4, "hidden_size": 64, "num_layers": 4, "ffn_hidden_size": 96}


def job(tensor: int, pipeline: int, context: int = 1, expert: int = 1, chunks: int = 1, **settings: object) -> JobShape:
    split = Split(layout=Layout(tensor, pipeline, context, expert), chunks=chunks)
    return JobShape(**({"ranks": 64, "split": split, "pack_length": 4096, "microbatches": 16} | settings))


def test_a_layer_of_70b_on_tp4_cp2():
    """2,048 positions of 8,192 on a rank: 16 query heads and 2 groups of 128, an MLP of 7,168."""
    forward, backward = layer_passes(LLAMA_70B, job(4, 4, 2), H100, keys=500, has_experts=False)
    qkv = 2 * 2048 * 8192 * (16 + 2 * 2) * 128 / RATE
    attention = 2 * (2 * 2048 * 500 * 16 * 128) / RATE
    projection = 2 * 2048 * (16 * 128) * 8192 / RATE
    mlp = 3 * (2 * 2048 * 8192 * 7168) / RATE
    assert forward.products == pytest.approx(qkv + attention + projection + mlp)
    assert backward.products == pytest.approx(2 * (qkv + projection + mlp) + 2.5 * attention)
    gathered = 2048 * 8192 * 2  # bytes of the hidden states of a pack's part: 33.6 MB, three quarters from the others
    one = gathered * 3 / 4 / NVLINK + LATENCY
    assert forward.tensor == pytest.approx(4 * one)
    assert one < mlp, "so the MLP hides its own"
    assert backward.tensor == pytest.approx(2 * one + 2 * max(0, one - qkv))
    # Keys and values of 4,096 positions, 2 groups, half of them here: ranks 4 apart, so in the node.
    keys_and_values = 2 * 4096 * 2 * 128 * 2
    assert forward.context == pytest.approx(keys_and_values / 2 / NVLINK + LATENCY)
    assert backward.context == forward.context
    assert (forward.expert, backward.expert) == (0, 0)


def test_tensor_parallelism_without_sequence_parallelism():
    """Two all-reduces, each a reduce-scatter and an all-gather; the backward two are behind products."""
    forward, backward = layer_passes(LLAMA_70B, job(8, 4, sequence_parallel=False), H100, 500, has_experts=False)
    one = 4096 * 8192 * 2 * 7 / 8 / NVLINK + LATENCY
    qkv = 2 * 4096 * 8192 * (8 + 2) * 128 / RATE
    mlp = 3 * 2 * 4096 * 8192 * 3584 / RATE
    assert forward.tensor == pytest.approx(4 * one)
    assert backward.tensor == pytest.approx(max(0, 2 * one - qkv) + max(0, 2 * one - mlp))


def test_context_parallelism_over_nodes_goes_through_the_ports():
    """8 tensor-parallel ranks fill a node: the two ranks of a context-parallel group have a port each."""
    forward, _ = layer_passes(LLAMA_70B, job(8, 4, 2), H100, 500, has_experts=False)
    assert forward.context == pytest.approx(2 * 4096 * 1 * 128 * 2 / 2 / PORT + LATENCY)
    assert H100.bandwidth(4, 4) == 2 * PORT, "two of the four ranks share a node, and so its two ports"
    assert H100.bandwidth(1, 64) == NVLINK, "eight ports are more than NVLink"


def test_experts_of_a_layer():
    """Mixtral on TP2 EP4: of 2,048 positions each goes to 2 experts, three quarters of them on other ranks."""
    mixtral = replace(LLAMA_8B, experts=8, expert_ffn=14336, vocab=32000)
    shape = job(2, 2, expert=4, ranks=32)
    forward, backward = layer_passes(mixtral, shape, H100, 500, has_experts=True)
    routed = 2048 * 2 * 4096 * 2
    across = routed * 3 / 4 / NVLINK + LATENCY  # 4 ranks, 2 apart
    within = 2 * routed / 2 / NVLINK + LATENCY
    assert forward.expert == backward.expert == pytest.approx(2 * (across + within))
    dense, _ = layer_passes(mixtral, shape, H100, 500, has_experts=False)
    # Twice an MLP's products, and the router's.
    more = (3 * 2 * 4096 * 4096 * 14336 + 2 * 4096 * 4096 * 8) / 2 / RATE
    assert forward.products - dense.products == pytest.approx(more)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_does_the_forward_part_again(granularity):
    recompute = Recompute(granularity=granularity, modules=frozenset({"mlp"}))
    plain, again = (layer_passes(LLAMA_70B, job(8, 4, recompute=each), H100, 500, has_experts=False)
                    for each in (Recompute(), recompute))  # fmt: skip
    mlp = Pass(3 * 2 * 4096 * 8192 * 3584 / RATE, 2 * (4096 * 8192 * 2 * 7 / 8 / NVLINK + LATENCY))
    assert again[0] == plain[0]
    expected = plain[0] if granularity == "full" else mlp
    assert again[1].seconds - plain[1].seconds == pytest.approx(expected.seconds)


def test_log_probs_of_the_last_stage():
    """Forward once, backward two gradients, and the logits again if the softmax is not kept; some more than a layer."""
    shape = job(4, 4, 2)
    forward, backward = log_prob_passes(LLAMA_70B, shape, H100)
    product = 2 * 2048 * 8192 * (128512 / 4) / RATE  # 128,256 rows, padded to a multiple of 512
    assert (forward.products, backward.products) == pytest.approx((product, 2 * product))
    layer = sum(each.seconds for each in layer_passes(LLAMA_70B, shape, H100, 500, has_experts=False))
    assert 1.0 < (forward.seconds + backward.seconds) / layer < 1.2
    _, again = log_prob_passes(LLAMA_70B, replace(shape, kept_softmax_bytes=0), H100)
    assert again.products == pytest.approx(3 * product)
    _, plain = log_prob_passes(LLAMA_70B, replace(shape, fused_log_probs=False), H100)
    assert plain.products == pytest.approx(2 * product)


def test_a_step_of_70b_on_64():
    """TP4 CP2 PP4 with 5 chunks: 16 microbatches on two replicas, the last stage is the slowest."""
    shape = job(4, 4, 2, chunks=5)
    found = step_time(LLAMA_70B, shape, H100, tokens=128_000, keys=500)
    forward, backward = layer_passes(LLAMA_70B, shape, H100, 500, has_experts=False)
    there, back = log_prob_passes(LLAMA_70B, shape, H100)
    layers, last = 20 * (forward.seconds + backward.seconds), there.seconds + back.seconds
    assert found.parts["products"] == pytest.approx(
        16 * (20 * (forward.products + backward.products) + there.products + back.products)
    )
    work = sum(found.parts[f"{part}"] for part in ("products", "tensor parallelism", "context parallelism"))
    assert work == pytest.approx(16 * (layers + last))
    assert found.parts["waiting"] == pytest.approx(3 / 5 * (layers + last / 4))
    # A chunk takes longer than what it sends: 8.4 MB. Six sends have no work of their own to hide behind.
    sent = 2048 * 8192 * 2 / 4 / PORT + LATENCY
    assert found.parts["sends"] == pytest.approx(2 * 3 * sent)
    own = stage_parameters(LLAMA_70B, shape.split, 3).total
    gradients = own * 4 * 3 / 4 / (2 * PORT) + LATENCY
    weights = gradients / 2
    # Of five chunks' gradients the last chunk's have one microbatch of that chunk to hide behind.
    exposed = [
        max(0, each - one / 5 * (1 + 4 * 4), (each - one) / 5)
        for each, one in (
            (gradients, 20 * backward.seconds + back.seconds),
            (weights, 20 * forward.seconds + there.seconds),
        )
    ]
    assert found.parts["data parallelism"] == pytest.approx(sum(exposed))
    assert found.parts["optimizer"] == pytest.approx(30 * own / 4 / (0.8 * 3.35e12))
    assert found.seconds == pytest.approx(1.82, abs=0.01)
    assert found.tokens_per_gpu == pytest.approx(128_000 / found.seconds / 64)
    assert found.mfu == pytest.approx(128_000 * operations(LLAMA_70B, 500, 1.0) / found.seconds / (64 * 989e12))


def test_operations_are_six_a_parameter_and_attention():
    matrices = 80 * (8192 * 128 * (64 + 2 * 8) + 8192 * 8192 + 3 * 8192 * 28672) + 8192 * 128256
    assert operations(LLAMA_70B, 500, 1.0) == pytest.approx(6 * matrices + 3 * 80 * 4 * 500 * 8192)


def test_windows_take_keys_away():
    """Sequences of 1,000: a query sees 500.5 keys on average, or of the last 100 all but the first 99 see 100."""
    windowed = replace(LLAMA_70B, windows=(99, None) * 40)
    seen = (sum(range(1, 101)) + 900 * 100) / 1000
    assert windowed.keys_seen(0, 500) == pytest.approx(seen, rel=1e-3)
    assert windowed.keys_seen(1, 500) == 500 and windowed.keys_seen(0, 40) == 40
    assert windowed.attended_share(500) == pytest.approx((1 + seen / 500) / 2, rel=1e-3)
    whole, less = operations(LLAMA_70B, 500, 1.0), operations(windowed, 500, 1.0)
    assert whole - less == pytest.approx(3 * 40 * 4 * (500 - seen) * 8192, rel=1e-3)
    assert (
        step_time(windowed, job(8, 4), H100, 128_000, 500).seconds
        < step_time(LLAMA_70B, job(8, 4), H100, 128_000, 500).seconds
    )


@pytest.mark.parametrize(
    ("skip", "expected"), [(None, (8, 8, 8, 8)), (2, (8, None, 8, None)), ([0, 1, 1, 0], (None, 8, 8, None))]
)
def test_windows_are_megatrons(skip, expected):
    from megatron.core.transformer.utils import is_layer_window_attention

    shape = ModelShape.from_arguments({**ARGUMENTS, "window_size": (8, 0), "window_attn_skip_freq": skip}, vocab=100)
    assert shape.windows == expected
    assert [each is not None for each in expected] == [
        is_layer_window_attention((8, 0), skip, number) for number in (1, 2, 3, 4)
    ]


def test_without_chunks_the_sends_are_waited_for():
    found = step_time(LLAMA_70B, job(8, 4), H100, 128_000, 500)
    assert found.parts["sends"] == pytest.approx(2 * (16 + 3) * (4096 * 8192 * 2 / 8 / PORT + LATENCY))


def test_the_layouts_of_the_recipes():
    """70B on 64: TP4 CP2 is a ninth faster than TP8, and within 1% of the fastest. 8B on 8: TP2, the fastest of all."""
    answers, _ = answer(question(LLAMA_70B, 64))
    seconds = {str(each): each.time.seconds for each in answers}
    assert [str(each) for each in answers[:2]] == ["TP2 PP8 VP5 CP4 DP1", "TP4 PP4 VP5 CP2 DP2"]
    assert seconds["TP4 PP4 VP5 CP2 DP2"] < 1.01 * answers[0].time.seconds
    assert seconds["TP8 PP4 VP5 DP2"] / seconds["TP4 PP4 VP5 CP2 DP2"] == pytest.approx(1.11, abs=0.01)
    assert str(answer(question(LLAMA_8B, 8))[0][0]) == "TP2 DP4"


def test_the_loss_as_a_layer():
    """A model of 95 layers divides by 8 only with the loss as the 96th. 80 layers have no such split: it is no use."""
    answers, _ = answer(question(replace(LLAMA_70B, layers=95), 64))
    assert str(answers[0]) == "TP4 PP8 VP6 CP2 loss DP1"
    assert not [each for each in answer(question(LLAMA_70B, 64))[0] if each.job.split.loss_as_layer]
    split = answers[0].job.split
    assert [len(chunk) for chunk in split.stage_layers(95, 7)] == [2] * 5 + [1]
    assert sorted(n for stage in range(8) for chunk in split.stage_layers(95, stage) for n in chunk) == [*range(95)]


def built_by_megatron(layers: int, stages: int, chunks: int) -> list[list[int]]:
    """Numbers of layers of each chunk of each stage, by Megatron's own count."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    config = TransformerConfig(
        num_layers=layers, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None, pipeline_dtype="bf16",
        account_for_loss_in_pipeline_split=True,
    )  # fmt: skip
    return [
        [get_num_layers_to_build(config, chunk if chunks > 1 else None, stage) for chunk in range(chunks)]
        for stage in range(stages)
    ]


@pytest.mark.parametrize(("layers", "stages", "chunks"), [(95, 4, 8), (31, 4, 1), (31, 2, 4), (3, 2, 2)])
def test_megatron_builds_what_is_counted(ranks, layers, stages, chunks):
    split = Split(layout=Layout(1, stages, 1), chunks=chunks, loss_as_layer=True)
    expected = [[len(chunk) for chunk in split.stage_layers(layers, stage)] for stage in range(stages)]
    assert ranks(1)(built_by_megatron, layers, stages, chunks) == [expected]


def test_a_run_with_the_loss_as_a_layer(ranks):
    """Three layers on two stages: the same losses as on one."""
    from tests.harness.jobs import last_stage, train

    flags = ["--num-layers", "3", "--train-iters", "2"]
    expected = ranks(1)(train, flags)
    more = ["--pipeline-model-parallel-size", "2", "--account-for-loss-in-pipeline-split"]
    found = last_stage(ranks(2)(train, [*flags, *more]))
    for step, expected_step in zip(found.steps, last_stage(expected).steps, strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=1e-6)
