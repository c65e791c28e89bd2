"""Adapters in the arithmetic of memory and time, done again by hand. Against real ranks: ``test_counted``."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.model.lora import lora_config as lora
from megatron_bdpo.planning.activations import layer_bytes
from megatron_bdpo.planning.adapters import (
    PROJECTIONS,
    Adapters,
    adapter_parameters,
    attention_linears,
    mlp_linears,
)
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.machine import Machine
from megatron_bdpo.planning.memory import GB, JobShape, fullest, stage_memory
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters
from megatron_bdpo.planning.search import answer
from megatron_bdpo.planning.speed import layer_passes, log_prob_passes, operations, step_time
from tests.harness.documents import ROOT
from tests.unit.planning.test_search import LLAMA_8B, LLAMA_70B, question
from tests.unit.planning.test_search import job as full_job

R = 16
LORA = Adapters(rank=R)
ALONE = Split(layout=Layout(1, 1, 1))
H100 = Machine()
RATE = 0.6 * 989e12
NVLINK, LATENCY = 0.75 * 450e9, 20e-6

#: (inputs, outputs) of query, key, value, o; gate, up, down of Llama 3 70B.
ATTENTION = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192)]
MLP = [(8192, 28672), (8192, 28672), (28672, 8192)]


def job(tensor: int, pipeline: int, adapters: Adapters | None = LORA, **settings: object) -> JobShape:
    return full_job(tensor, pipeline, 8, **({"pack_length": 4096, "microbatches": 32, "adapters": adapters} | settings))


def test_the_linear_layers_are_those_that_adapters_are_put_beside():
    linears = [*attention_linears(LLAMA_70B), *mlp_linears(LLAMA_70B, LLAMA_70B.ffn)]
    assert [tuple(each.outputs) for each in linears] == list(lora.LINEARS.values())
    assert PROJECTIONS == lora.PROJECTIONS


def test_adapters_of_70b():
    """r (in + out) of each projection; with DoRA one number more for each output."""
    whole = adapter_parameters(LLAMA_70B, ALONE, LORA, 0)
    assert whole.layers == 80 * R * sum(inputs + outputs for inputs, outputs in ATTENTION + MLP) == 207_093_760
    assert whole.total == whole.layers
    dora = adapter_parameters(LLAMA_70B, ALONE, replace(LORA, dora=True), 0)
    assert dora.total - whole.total == 80 * sum(outputs for _, outputs in ATTENTION + MLP)


def test_a_rank_of_tp4_pp2():
    """A whole beside column-parallel layers, B whole beside row-parallel ones, the others by four."""
    columns = sum(inputs + outputs // 4 for inputs, outputs in [*ATTENTION[:3], *MLP[:2]])
    rows = sum(inputs // 4 + outputs for inputs, outputs in [ATTENTION[3], MLP[2]])
    expected = 40 * R * (columns + rows)
    split = Split(layout=Layout(4, 2, 1))
    assert adapter_parameters(LLAMA_70B, split, LORA, 0).total == expected
    parts = stage_memory(LLAMA_70B, job(4, 2, distributed_optimizer=False), 0).parts
    assert parts["weights"] == 2 * (stage_parameters(LLAMA_70B, split, 0).total + expected)
    assert parts["gradients"] == 4 * expected
    assert parts["optimizer"] == 12 * expected
    assert parts["reference"] == 0


def test_experts_have_adapters_each():
    """On EP4 with experts whole: two experts of 8; the attention's over two tensor-parallel ranks."""
    mixtral = replace(LLAMA_8B, experts=8, expert_ffn=14336)
    split = Split(layout=Layout(2, 1, 1, 4), expert_tensor=1)
    found = adapter_parameters(mixtral, split, LORA, 0)
    assert found.experts == 32 * 2 * R * 3 * (4096 + 14336)
    assert found.layers == 32 * R * ((4096 + 2048) + 2 * (4096 + 512) + (2048 + 4096))


def test_what_a_layer_keeps_more():
    """u, the A side by side, and for DoRA the outputs; but not the inputs of layers without adapters."""
    plain, low, dora, some = (
        layer_bytes(LLAMA_70B, job(4, 2).split, job(4, 2, adapters).pack(), has_experts=False)
        for adapters in (None, LORA, replace(LORA, dora=True), Adapters(rank=R, targets=("q_proj",)))
    )
    s, e = 4096, 2
    assert low.projection - plain.projection == e * (s * 3 * R + 3 * R * 8192 + s / 4 * R + R * 8192 / 4)
    assert low.mlp - plain.mlp == e * (s * 2 * R + 2 * R * 8192 + s / 4 * R + R * 28672 / 4)
    assert low.norms == plain.norms
    assert dora.total - low.total == e * s * (8192 + 2 * 1024 + 8192 + 2 * 28672 + 8192) / 4
    assert plain.norms - some.norms == e * s * 8192 / 4  # the MLP's input
    assert plain.mlp - some.mlp == e * s * 28672 / 4  # down's
    assert plain.projection - some.projection == e * s * 8192 / 4 - e * (s * R + R * 8192)


def test_a_layers_time():
    """No gradients of weights: two thirds of the products. Nothing hides the reduce-scatters of inputs' gradients."""
    shape = job(4, 2)
    forward, backward = layer_passes(LLAMA_70B, shape, H100, 500, has_experts=False)
    plain, plain_backward = layer_passes(LLAMA_70B, replace(shape, adapters=None), H100, 500, has_experts=False)
    own = 2 * 4096 * R / 4 * sum(inputs + outputs for inputs, outputs in ATTENTION + MLP) / RATE
    attention = 4 * 4096 * 500 * 64 * 128 / 4 / RATE
    assert forward.products - plain.products == pytest.approx(own)
    assert backward.products == pytest.approx(plain.products + 1.5 * attention + 2 * own)
    assert 0.64 < (forward.products + backward.products) / (plain.products + plain_backward.products) < 0.68
    one = 4096 * 8192 * 2 * 3 / 4 / NVLINK + LATENCY
    low = 4096 * 2 * R * (3 + 1 + 2 + 1) * 3 / 4 / NVLINK + 4 * LATENCY
    assert forward.tensor == pytest.approx(4 * one + low)
    assert backward.tensor == pytest.approx(4 * one + low)
    there, back = log_prob_passes(LLAMA_70B, shape, H100)
    assert back.products == there.products


def test_only_adapters_are_shared_and_updated():
    """Gradients, weights and optimizer of a step are those of 0.3% of the model."""
    found, whole = (step_time(LLAMA_70B, job(4, 1, adapters), H100, 128_000, 500).parts for adapters in (LORA, None))
    own = adapter_parameters(LLAMA_70B, job(4, 1).split, LORA, 0).total
    assert found["optimizer"] == pytest.approx(30 * own / 2 / (0.8 * 3.35e12))
    assert found["optimizer"] < 0.01 * whole["optimizer"]
    assert found["data parallelism"] == 0


def test_operations_are_four_a_frozen_parameter():
    matrices = 80 * sum(inputs * outputs for inputs, outputs in ATTENTION + MLP) + 8192 * 128256
    attention = 3 * 80 * 4 * 500 * 8192
    found = operations(LLAMA_70B, 500, 1.0, LORA)
    assert found == pytest.approx(4 * matrices + attention + 6 * 207_093_760)


def test_70b_fits_a_node_with_adapters_alone():
    eight = question(LLAMA_70B, 8)
    answers, _ = answer(replace(eight, job=job(1, 1)))
    assert "TP4 PP2 VP8 DP1" in [str(each) for each in answers]
    assert answers[0].memory.total < 72 * GB
    assert not answer(eight)[0]


def test_every_tensor_parallel_rank_needs_a_query_group():
    two_groups = replace(LLAMA_8B, groups=2)
    with_adapters = replace(question(two_groups, 4), job=job(1, 1))
    reasons = {each.layout: each.reason for each in answer(with_adapters)[1]}
    assert "2 query groups cannot be split over 4" in reasons[Layout(4, 1, 1)]
    assert Layout(4, 1, 1) not in {each.layout for each in answer(question(two_groups, 4))[1]}


# The program


def test_the_program(config, capsys):
    words = ["plan", "--hf-model", config, "--gpus", "1", "--lora-rank", "8"]
    assert main([*words, "--lora-targets", "attention", "--lora-type", "dora"]) == 0
    text = capsys.readouterr().out
    assert "bf16, DoRA of rank 8 beside q_proj, k_proj, v_proj, o_proj, reference the model without it" in text
    assert "--lora-rank 8 --lora-targets q_proj,k_proj,v_proj,o_proj --lora-type dora" in text
    totals = []
    for reference in ("resident", "precomputed"):
        assert main([*words, "--json", "--reference", reference]) == 0
        totals.append(json.loads(capsys.readouterr().out)[0]["feasible"][0]["bytes"])
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lora-targets", "mlp"], "Add --lora-rank"),
        (["--lora-rank", "8", "--lora-targets", "router"], "--lora-targets router: no such projection"),
        (["--lora-rank", "0"], "--lora-rank"),
    ],
)
def test_mistakes(config, capsys, flags, expected):
    assert main(["plan", "--hf-model", config, "--gpus", "8", *flags]) == 2
    assert expected in capsys.readouterr().err


def of_recipe(recipe: str, model: str) -> tuple[ModelShape, dict[str, object]]:
    from megatron_bdpo.training import job_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODEL", model)
        return job_memory.of_recipe([recipe])


def test_a_recipes_adapters(ranks, config):
    ((_, told),) = ranks(1)(of_recipe, str(ROOT / "recipes" / "llama3_70b_lora.yaml"), config)
    assert told["adapters"] == LORA


# The document


ROWS = {
    "LoRA, rank 16": LORA,
    "LoRA, rank 64": Adapters(rank=64),
    "LoRA, rank 16, of attention": Adapters(rank=16, targets=PROJECTIONS[:4]),
    "DoRA, rank 16": Adapters(rank=16, dora=True),
    "the whole model": None,
}


def test_the_table_of_70b_on_a_node():
    """In docs/layouts.md: the recipe's layout and packs."""
    split = Split(layout=Layout(4, 2, 1), chunks=8)
    lines = []
    for name, adapters in ROWS.items():
        memory = fullest(LLAMA_70B, job(4, 2, adapters, split=split))
        sizes = [memory.parts[part] for part in ("weights", "gradients", "optimizer", "activations")]
        rest = memory.total - sum(sizes)
        lines.append(f"| {name} | {' | '.join(f'{size / GB:.1f}' for size in (*sizes, rest, memory.total))} |\n")
    assert "".join(lines) in (ROOT / "docs" / "layouts.md").read_text("utf-8"), "".join(lines)
