"""The estimate against the bytes that real ranks hold: parameters, gradients, optimizer, and what autograd keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_bdpo.planning.activations import Recompute, stage_bytes
from megatron_bdpo.planning.adapters import Adapters
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import JobShape, kept_of_output, state, trained_parameters
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters
from tests.harness.jobs import TINY_MODEL
from tests.harness.memory import Held, count

VOCABULARY = 1024  # of the example's tokenizer

#: At a hidden size of 32, what is left out (an RMS, a token's id, a routing choice per position) is one to three
#: hundredths of what is kept.
TOLERANCE = 0.03

TIED = {"untie_embeddings_and_output_weights": False}
GPT2 = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "group_query_attention": False,
    "max_position_embeddings": 512,
}
QWEN = {"add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 16}
OLMO = {"qk_layernorm": True, "kv_channels": 16, "qk_norm_over_heads": True, "layer_norms": "after"}
EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_layer_freq": 2,
    "moe_ffn_hidden_size": 48,
}

LATENTS = {
    "multi_latent_attention": True,
    "group_query_attention": False,
    "num_query_groups": None,
    "qk_layernorm": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_head_dim": 24,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 32,  # with another than keys', torch's attention on a CPU keeps its scores
    "kv_channels": 32,
    "rope_type": "rope",
    "transformer_impl": "local",
}

SP = "--sequence-parallel"
DISTRIBUTED = "--use-distributed-optimizer"
FULL = Recompute(granularity="full")
BLOCK = Recompute(granularity="full", method="block", layers=2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job and how the estimate is told of it."""

    ranks: int = 1
    flags: str = ""
    split: Split = field(default_factory=lambda: Split(layout=Layout(1, 1, 1)))
    recompute: Recompute = field(default_factory=Recompute)
    model: Mapping[str, Any] = field(default_factory=dict)
    adapters: Adapters | None = None

    def command_line(self) -> list[str]:
        """All flags of the job."""
        recompute, words = self.recompute, [str(self.split.layout).replace("data parallelism alone", ""), self.flags]
        if self.split.chunks > 1:
            words.append("--num-layers-per-virtual-pipeline-stage 1")
        if self.split.first_layers:
            words.append(f"--decoder-first-pipeline-num-layers {self.split.first_layers}")
        if recompute.granularity:
            words.append(f"--recompute-granularity {recompute.granularity}")
        if recompute.modules:
            words.append(f"--recompute-modules {' '.join(recompute.modules)}")
        if recompute.granularity == "full":
            words.append(f"--recompute-method {recompute.method} --recompute-num-layers {recompute.layers}")
        if self.adapters:
            words.append(self.adapters.flags())
        return " ".join(words).split()

    def shapes(self, held: Held) -> tuple[ModelShape, JobShape]:
        """What the estimate is made from."""
        model = ModelShape.from_arguments({**TINY_MODEL, **self.model}, VOCABULARY)
        return model, JobShape(
            ranks=self.ranks,
            split=self.split,
            pack_length=held.pack_length,
            microbatches=held.microbatches,
            precision="bf16" if "--bf16" in self.flags else "fp32",
            sequence_parallel=SP in self.flags,
            distributed_optimizer=DISTRIBUTED in self.flags,
            recompute=self.recompute,
            adapters=self.adapters,
            fused_layers=False,
            keys=held.keys,
            scored_share=held.scored / held.pack_length * self.split.layout.context,
        )


def selective(module: str) -> Recompute:
    return Recompute(granularity="selective", modules=frozenset({module}))


CASES = {
    "one rank": Case(),
    "tied": Case(model=TIED),
    "experts": Case(model=EXPERTS),
    "bf16": Case(flags="--bf16"),
    "full recompute": Case(recompute=FULL),
    "two layers of four recomputed": Case(recompute=BLOCK),
    "core_attn recomputed": Case(recompute=selective("core_attn")),
    "mlp recomputed": Case(recompute=selective("mlp")),
    "DP2, bf16, distributed optimizer": Case(ranks=2, flags=f"--bf16 {DISTRIBUTED}"),
    "TP2, biases, LayerNorm": Case(ranks=2, split=Split(layout=Layout(2, 1, 1)), model=GPT2),
    "TP2 SP, qk-norm": Case(ranks=2, split=Split(layout=Layout(2, 1, 1)), flags=SP, model=QWEN),
    "parallel layers": Case(model={"normalization": "LayerNorm", "norms_without_bias": True, "parallel_layers": True}),
    "norms around, bf16": Case(flags="--bf16", model={"layer_norms": "around"}),
    "norms behind, qk-norm over heads, bf16": Case(flags="--bf16", model=OLMO),
    "TP2 SP, norms behind, qk-norm over heads": Case(
        ranks=2, split=Split(layout=Layout(2, 1, 1)), flags=SP, model=OLMO
    ),
    "CP2, distributed optimizer": Case(ranks=2, split=Split(layout=Layout(1, 1, 2)), flags=DISTRIBUTED),
    "PP2, tied": Case(ranks=2, split=Split(layout=Layout(1, 2, 1)), model=TIED),
    "PP2, 1 + 3 layers": Case(ranks=2, split=Split(layout=Layout(1, 2, 1), first_layers=1)),
    "PP2, full recompute": Case(ranks=2, split=Split(layout=Layout(1, 2, 1)), recompute=FULL),
    "PP2 VPP2": Case(ranks=2, split=Split(layout=Layout(1, 2, 1), chunks=2)),
    "EP2, distributed optimizer": Case(
        ranks=2, split=Split(layout=Layout(1, 1, 1, 2)), flags=DISTRIBUTED, model=EXPERTS
    ),
    "TP4 SP, fewer groups": Case(ranks=4, split=Split(layout=Layout(4, 1, 1)), flags=SP),
    "TP2 SP PP2": Case(ranks=4, split=Split(layout=Layout(2, 2, 1)), flags=SP),
    "sinks, experts with biases": Case(
        model=EXPERTS | {"add_bias_linear": True, "softmax_type": "learnable", "swiglu": False, "quick_geglu": True}
    ),
    "latents": Case(model=LATENTS),
    "TP2 SP, latents of keys alone": Case(
        ranks=2, split=Split(layout=Layout(2, 1, 1)), flags=SP, model=LATENTS | {"q_lora_rank": None}
    ),
    "gpt-oss": Case(
        model=EXPERTS
        | {"add_bias_linear": True, "softmax_type": "learnable", "swiglu": False, "quick_geglu": True}
        | {"activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0}
    ),
    "TP2 SP PP2, experts": Case(ranks=4, split=Split(layout=Layout(2, 2, 1)), flags=SP, model=EXPERTS),
}

LORA = Adapters(rank=6)
DORA = Adapters(rank=6, dora=True)
SOME = Adapters(rank=6, targets=("q_proj", "v_proj", "up_proj"))
OVERLAPPED = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"

#: Jobs with adapters.
CASES |= {
    "LoRA": Case(adapters=LORA),
    "LoRA of some, bf16": Case(flags="--bf16", adapters=SOME),
    "LoRA of the others": Case(adapters=Adapters(rank=6, targets=("o_proj", "down_proj"))),
    "LoRA, full recompute": Case(recompute=FULL, adapters=LORA),
    "DoRA, mlp recomputed, experts": Case(recompute=selective("moe"), model=EXPERTS, adapters=DORA),
    "LoRA, DP2, bf16, distributed optimizer": Case(ranks=2, flags=f"--bf16 {OVERLAPPED}", adapters=LORA),
    "DoRA, TP2, biases, LayerNorm": Case(ranks=2, split=Split(layout=Layout(2, 1, 1)), model=GPT2, adapters=DORA),
    "LoRA, PP2 VPP2": Case(ranks=2, split=Split(layout=Layout(1, 2, 1), chunks=2), adapters=LORA),
    "LoRA, EP2, distributed optimizer": Case(
        ranks=2, split=Split(layout=Layout(1, 1, 1, 2)), flags=DISTRIBUTED, model=EXPERTS, adapters=LORA
    ),
    "DoRA, TP2 SP PP2": Case(ranks=4, split=Split(layout=Layout(2, 2, 1)), flags=SP, adapters=DORA),
    "LoRA, TP2 SP EP2, experts": Case(
        ranks=4, split=Split(layout=Layout(2, 1, 1, 2)), flags=f"{SP} {DISTRIBUTED}", model=EXPERTS, adapters=LORA
    ),
}

#: One step of eight pairs in four packs: more than any stage here holds. SimPO needs no reference.
JOB = {"max_pairs": 8, "pairs_per_step": 8, "train_iters": 1, "preference_loss": "simpo"}


@pytest.fixture(scope="module", params=CASES)
def counted(request, ranks, tmp_path_factory) -> tuple[Case, list[Held]]:
    """What each rank of the case's job has held."""
    case = CASES[request.param]
    cache = tmp_path_factory.getbasetemp() / "counted"
    return case, ranks(case.ranks)(count, case.command_line(), pair_cache_dir=str(cache), **(JOB | dict(case.model)))


def by_stage(case: Case, held: list[Held]) -> list[tuple[int, Held]]:
    """(pipeline stage, what a rank of it holds): Megatron numbers the ranks of a stage one after the other."""
    per_stage = case.ranks // case.split.layout.pipeline
    return [(rank // per_stage, each) for rank, each in enumerate(held)]


def test_parameters_are_exact(counted):
    case, ranks_held = counted
    for stage, held in by_stage(case, ranks_held):
        model, job = case.shapes(held)
        frozen = stage_parameters(model, job.split, stage).total if case.adapters else 0
        assert held.parameters == frozen + trained_parameters(model, job, stage).total
        assert held.weights == state(model, job, stage)["weights"]


def test_gradients_are_exact_but_for_the_padding_of_buckets(counted):
    case, ranks_held = counted
    for stage, held in by_stage(case, ranks_held):
        model, job = case.shapes(held)
        expected = state(model, job, stage)["gradients"]
        # The distributed optimizer starts each tensor at a multiple of 64 elements, and ends a bucket at one of 128 for
        # each data-parallel rank.
        padding = 4 * (64 * held.parameter_tensors + 2 * 128 * case.ranks) if job.distributed_optimizer else 0
        assert expected <= held.gradients <= expected + padding


def test_the_optimizers_state_is_exact(counted):
    case, ranks_held = counted
    stages: dict[int, list[tuple[float, float]]] = {}
    for stage, held in by_stage(case, ranks_held):
        model, job = case.shapes(held)
        expected = state(model, job, stage)["optimizer"]
        stages.setdefault(stage, []).append((held.optimizer, expected))
    for values in stages.values():
        # Ranks cut their buffer into equal parts, of which the last one may hold padding: exact over all of them.
        found, expected = map(sum, zip(*values, strict=True))
        assert found == pytest.approx(expected, rel=1e-12)


def test_activations(counted):
    case, ranks_held = counted
    for stage, held in by_stage(case, ranks_held):
        model, job = case.shapes(held)
        kept, recomputed = stage_bytes(model, job.split, job.pack(), job.recompute, stage, job.microbatches)
        is_last = stage == case.split.layout.pipeline - 1
        expected = kept + max(recomputed, kept_of_output(model, job) if is_last else 0.0)
        assert math.isclose(held.saved, expected, rel_tol=TOLERANCE), held.saved / expected
