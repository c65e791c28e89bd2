"""Weights, gradients and optimizer against Megatron's own report of them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import JobShape, state
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters

LLAMA_70B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "ffn_hidden_size": 28672,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "vocab_size": 128256,
}
LLAMA_8B = LLAMA_70B | {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
}
GEMMA = LLAMA_8B | {"num_layers": 28, "hidden_size": 3072, "kv_channels": 256, "num_attention_heads": 16} | {
    "num_query_groups": 16, "vocab_size": 256000, "untie_embeddings_and_output_weights": False,
}  # fmt: skip
GPT = {
    "num_layers": 24,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 16,
    "group_query_attention": False,
    "num_query_groups": None,
    "normalization": "LayerNorm",
    "swiglu": False,
    "vocab_size": 50257,
}
MIXTRAL = LLAMA_8B | {"num_experts": 8, "moe_ffn_hidden_size": 14336, "vocab_size": 32000}
QWEN_MOE = LLAMA_8B | {
    "num_experts": 64,
    "moe_ffn_hidden_size": 1408,
    "moe_router_topk": 8,
    "moe_layer_freq": 2,
    "moe_shared_expert_intermediate_size": 5632,
    "moe_shared_expert_gate": True,
}

MODELS = {"70B": LLAMA_70B, "8B": LLAMA_8B, "tied": GEMMA, "GPT": GPT, "Mixtral": MIXTRAL, "shared expert": QWEN_MOE}

#: ranks, tp, pp, cp, ep, expert tensor parallelism
LAYOUTS = [
    (1, 1, 1, 1, 1, 1),
    (8, 2, 1, 1, 1, 2),
    (8, 1, 4, 1, 1, 1),
    (32, 4, 4, 1, 1, 4),
    (64, 8, 4, 1, 1, 8),
    (64, 8, 2, 2, 1, 8),
    (64, 4, 2, 2, 4, 1),
    (128, 2, 4, 4, 8, 2),
]

DEFAULTS: dict[str, Any] = {
    "group_query_attention": True,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_latent_size": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
}


def reported(cases: list[dict[str, Any]]) -> list[float]:
    """Megatron's bytes on the fullest rank."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    return [compute_weight_and_optimizer_memory(Namespace(**case)) for case in cases]


def case(name: str, layout: tuple[int, ...], distributed: bool) -> tuple[dict[str, Any], ModelShape, JobShape]:
    """A model in a layout, for both sides."""
    arguments = DEFAULTS | MODELS[name]
    arguments.setdefault("kv_channels", arguments["hidden_size"] // arguments["num_attention_heads"])
    ranks, tp, pp, cp, ep, etp = layout
    model = ModelShape.from_arguments(arguments, arguments["vocab_size"])
    split = Split(layout=Layout(tp, pp, cp, ep), expert_tensor=etp)
    job = JobShape(
        ranks=ranks, split=split, pack_length=1, microbatches=1, distributed_optimizer=distributed
    )  # fmt: skip
    theirs = arguments | {
        "world_size": ranks,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "data_parallel_size": job.data_parallel * cp,  # see below
        "use_distributed_optimizer": distributed,
        "padded_vocab_size": model.padded_vocab(tp),
    }
    return theirs, model, job


CASES = [
    (name, layout, distributed)
    for name in MODELS
    for layout in LAYOUTS
    for distributed in (False, True)
    if (layout[4] == 1 or "num_experts" in MODELS[name]) and MODELS[name]["num_layers"] % layout[2] == 0
]


@pytest.fixture(scope="module")
def megatrons(ranks) -> dict[tuple[Any, ...], float]:
    (values,) = ranks(1)(reported, [case(*each)[0] for each in CASES])
    return dict(zip(CASES, values, strict=True))


@pytest.mark.parametrize("each", CASES, ids=str)
def test_weights_gradients_and_optimizer(megatrons, each):
    """Megatron's report is of the first stage, in its own simplification:

    - The final norm is spread over the stages; it is on the last one.
    - It takes the data-parallel ranks for those that share the optimizer's state. The context-parallel ones share it
      too (seen in test_counted), so it is told the product.
    """
    _, model, job = case(*each)
    _, layout, distributed = each
    pipeline = layout[2]
    found = sum(state(model, job, 0).values())
    final_norm = model.norm_vectors * model.hidden
    per_parameter = 6 + 12 / (job.data_parallel * job.split.layout.context) if distributed else 18
    expected = megatrons[each] - (final_norm / pipeline * per_parameter if pipeline > 1 else 0)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_hold_the_model(name):
    """Every parameter once; the embedding twice where it is tied across stages."""
    _, model, job = case(name, (32, 4, 4, 1, 1, 4), True)
    whole, _ = (case(name, (1, 1, 1, 1, 1, 1), True)[1:], None)
    one = stage_parameters(whole[0], whole[1].split, 0)
    stages = [stage_parameters(model, job.split, stage) for stage in range(4)]
    norms = model.norm_vectors * model.hidden
    replicated = 2 * norms * model.layers + norms
    if model.experts:
        per_layer = model.hidden * model.experts + (model.hidden if model.shared_expert_gate else 0)
        replicated += per_layer * sum(map(model.has_experts, range(model.layers)))
    padding = (model.padded_vocab(4) - model.padded_vocab(1)) * model.hidden
    tables = 2  # embedding and output layer
    expected = one.total + (model.padded_vocab(1) * model.hidden if model.tied else 0) + tables * padding
    assert 4 * sum(stage.total for stage in stages) - 3 * replicated == expected
