"""The identity of a reference: the same wherever and however it is computed, another for whatever changes numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness.jobs import TINY_JOB, TINY_MODEL, own_process

TP2, PP2, CP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "context"))
EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"

#: Flags, ranks.
LAYOUTS = {
    "TP2": (TP2, 2),
    "TP2 SP": (f"{TP2} --sequence-parallel", 2),
    "PP2": (PP2, 2),
    "PP2, uneven": (f"{PP2} --decoder-first-pipeline-num-layers 1", 2),
    "PP2 VPP2": (f"{PP2} --num-layers-per-virtual-pipeline-stage 1", 2),
    "PP2 by layout": (f"{PP2} --pipeline-model-parallel-layout Et|tttL", 2),
    "CP2": (CP2, 2),
    "DP4": ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 4),
    "all": (f"{TP2} {PP2} {CP2} --sequence-parallel --num-layers-per-virtual-pipeline-stage 1", 16),
}
EXPERT_LAYOUTS = {
    "EP2": ("--expert-model-parallel-size 2", 2),
    "EP2 TP2 SP": (f"{TP2} --expert-model-parallel-size 2 --sequence-parallel", 4),
    "EP2 TP2 ETP1": (f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel", 2),
}
#: Of one rank: what a training run may have and its scoring may not.
OF_NO_CONCERN = [
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--seed 7 --init-method-std 0.1 --lr 1e-5 --hidden-dropout 0.1 --attention-dropout 0.1",
    "--reference resident --pairs-per-step 4 --seq-length 256 --no-pack-pairs --log-entropy",
    "--deterministic-mode --pair-attention sdpa --log-prob-chunk-size 100",
    "--save SOMEWHERE --load SOMEWHERE --save-interval 1 --async-save",
]
#: Flags -> the names in which the identity is another than the tiny model's.
COUNTS = {
    "--num-layers 2": {"num_layers"},
    "--num-query-groups 4": {"num_query_groups"},
    "--norm-epsilon 1e-3": {"layernorm_epsilon"},
    "--normalization LayerNorm": {"normalization"},
    "--apply-layernorm-1p": {"layernorm_zero_centered_gamma"},
    "--rotary-base 500000": {"rotary_base"},
    "--rotary-percent 0.5": {"rotary_percent"},
    "--rotary-interleaved": {"rotary_interleaved"},
    "--rotary-seq-len-interpolation-factor 2": {"seq_len_interpolation_factor"},
    "--use-rope-scaling": {"rope_scaling"},
    "--use-rope-scaling --rope-scaling-factor 4": {"rope_scaling", "rope_scaling_factor"},
    "--scale-embeddings": {"scale_embeddings"},
    "--geglu-tanh": {"activation_func"},
    "--qk-layernorm": {"qk_layernorm"},
    "--qk-l2-norm": {"qk_l2_norm"},
    "--window-size 64,0": {"window_size"},
    "--window-size 64,0 --window-attn-skip-freq 2": {"window_size", "window_attn_skip_freq"},
    "--bf16": {"bf16", "params_dtype", "autocast_dtype"},
    "--bf16 --attention-softmax-in-fp32": {"bf16", "params_dtype", "autocast_dtype", "attention_softmax_in_fp32"},
    "--log-probs plain": {"log_probs"},
    "--num-experts 4": {"num_moe_experts", "moe_ffn_hidden_size"},
    "--num-experts 4 --moe-router-topk 3": {"num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk"},
}
_ALWAYS = """
    weights vocabulary position_embedding_type share_embeddings_and_output_weights hidden_size ffn_hidden_size
    kv_channels gated_linear_unit activation_func add_bias_linear add_qkv_bias softmax_scale fp16 fp8 fp8_recipe fp4
    apply_query_key_layer_scaling apply_residual_connection_post_layernorm transformer_impl moe_layer_freq
    moe_shared_expert_intermediate_size moe_router_score_function moe_router_pre_softmax moe_router_dtype
    moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
    """
#: What no list may leave out.
ARITHMETIC = {name for names in COUNTS.values() for name in names} | set(_ALWAYS.split())


def configurations(command_lines: list[tuple[str, int]]) -> list[Any]:
    """On a rank: the model's configuration, as Megatron's validation makes it of each command line, each done twice."""
    from unittest import mock

    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags import validation
    from megatron_bdpo.training.flags.arguments import Arguments

    make, found = validation.model_config, []
    keep = mock.patch.object(validation, "model_config", lambda arguments: found.append(make(arguments)))
    with keep, distributed.process_groups(own_process()):
        for flags, ranks in command_lines:
            arguments = Arguments.parse(flags.split(), TINY_MODEL | TINY_JOB)
            arguments.set(world_size=ranks)
            validation.rehearse(arguments)
            validation.rehearse(arguments)
    return found


def identity_of(config: Any, kernel: str = "fused") -> dict[str, Any]:
    from megatron_bdpo.logprobs import TokenScoring
    from megatron_bdpo.training.reference.fingerprint import reference_identity

    return reference_identity(config, "0123456789abcdef", TokenScoring(1024, kernel=kernel))


def identities(command_lines: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """On a rank: that of each command line."""
    found = []
    for index, config in enumerate(configurations(command_lines)):
        kernel = "plain" if "--log-probs plain" in command_lines[index // 2][0] else "fused"
        found.append(identity_of(config, kernel))
    assert found[::2] == found[1::2], "Megatron's second validation changes it"
    return found[::2]


@pytest.fixture(scope="module")
def tiny(ranks) -> dict[str, Any]:
    return ranks(1)(identities, [("", 1)])[0][0]


def differing(there: dict[str, Any], here: dict[str, Any]) -> set[str]:
    return {name for name in {**there, **here} if there.get(name, ...) != here.get(name, ...)}


def test_all_layouts_have_one_identity(ranks, tiny):
    (found,) = ranks(1)(identities, list(LAYOUTS.values()))
    assert [differing(tiny, each) for each in found] == [set()] * len(LAYOUTS)
    split = [(f"{EXPERTS} {flags}", size) for flags, size in EXPERT_LAYOUTS.values()]
    one, *others = ranks(1)(identities, [(EXPERTS, 1), *split])[0]
    assert [differing(one, other) for other in others] == [set()] * len(EXPERT_LAYOUTS)


def test_what_is_of_no_concern_to_a_reference_does_not_count(ranks, tiny):
    (found,) = ranks(1)(identities, [(flags, 1) for flags in OF_NO_CONCERN])
    assert [differing(tiny, each) for each in found] == [set()] * len(OF_NO_CONCERN)


def test_what_changes_numbers_counts_by_its_name(ranks, tiny):
    (found,) = ranks(1)(identities, [(flags, 1) for flags in COUNTS])
    assert {flags: differing(tiny, each) for flags, each in zip(COUNTS, found, strict=True)} == COUNTS


def test_yarn_counts_although_megatron_declares_no_fields_for_it(ranks, tiny):
    flags = "--position-embedding-type yarn --yarn-original-max-position-embeddings 128 --yarn-beta-fast "
    one, other = ranks(1)(identities, [(flags + beta, 1) for beta in ("32", "16")])[0]
    assert "yarn_rotary_scaling_factor" in differing(tiny, one)
    assert differing(one, other) == {"yarn_beta_fast"}


def test_it_is_json_and_nothing_of_the_process(ranks, tiny):
    assert json.loads(json.dumps(tiny)) == tiny
    assert " at 0x" not in json.dumps(tiny)
    assert tiny.keys() >= ARITHMETIC
    assert tiny["activation_func"] == "torch.nn.functional.silu" and tiny["params_dtype"] == "torch.float32"


def walk() -> tuple[set[str], set[str], set[str]]:
    """On a rank, every field, its value changed: those that change the identity, those that do not, those left out."""
    from megatron_bdpo.training.reference.fingerprint import LEFT_OUT

    (config, _) = configurations([("", 1)])
    before, counted, ignored = identity_of(config), set(), set()
    for part in (config, config.transformer, config.layers):
        for name, value in list(vars(part).items()):
            if value in (config.transformer, config.layers):
                continue
            object.__setattr__(part, name, _other(value))  # some are frozen
            (ignored if identity_of(config) == before else counted).add(name)
            object.__setattr__(part, name, value)
    assert identity_of(config) == before
    return counted, ignored, set(" ".join(LEFT_OUT.values()).split())


def _other(value: Any) -> Any:
    import torch

    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case None:
            return 1
        case torch.dtype():
            return torch.float64
        case list() | tuple():
            return [*value, 1]
        case _:
            return str  # of a word, an enumeration or a function


def test_every_field_counts_or_is_left_out_by_name(ranks):
    """Each list is of true fields, too: a name that is misspelt there leaves nothing out."""
    ((counted, ignored, left_out),) = ranks(1)(walk)
    assert ignored == left_out
    assert counted >= ARITHMETIC - {"weights", "vocabulary", "log_probs"}
    assert len(counted) > 100


def unknown_fields() -> list[dict[str, Any]]:
    """On a rank: of a configuration without and with a field that this version of Megatron does not have."""
    import dataclasses

    from megatron.core.transformer import TransformerConfig

    @dataclasses.dataclass
    class Newer(TransformerConfig):
        sharpness: float = 1.0

    (config, _) = configurations([("", 1)])
    found = [identity_of(config)]
    known = {each.name: getattr(config.transformer, each.name) for each in dataclasses.fields(config.transformer)}
    for sharpness in (1.0, 2.0):
        config.transformer = Newer(**known, sharpness=sharpness)
        found.append(identity_of(config))
    return found


def test_a_field_of_a_later_megatron_counts(ranks):
    ((without, one, two),) = ranks(1)(unknown_fields)
    assert differing(without, one) == differing(one, two) == {"sharpness"}


def told(name: str) -> list[Any]:
    """On a rank: the identity's entries for some values of a field, or why there is none."""
    import enum
    import functools

    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec
    from torch.nn import functional

    class Recipe(enum.StrEnum):
        tensorwise = "tensorwise"

    def offset(by: float) -> Any:
        def shifted(x: Any) -> Any:
            return x + by

        return shifted

    (config, _) = configurations([("", 1)])
    found: list[Any] = []
    values = [
        functools.partial(functional.gelu, approximate="tanh"),
        functools.partial(functional.gelu, approximate="none"),
        functional.gelu,
        offset(1.0),
        offset(2.0),
        Recipe.tensorwise,
        (1, torch.bfloat16),
        {"a": torch.nn.Linear},
        ModuleSpec(module=torch.nn.Linear, params={"bias": False}),
        lambda x: x,
        torch.zeros(2),
        object(),
    ]
    for value in values:
        setattr(config.transformer, name, value)
        try:
            found.append(identity_of(config)[name])
        except TypeError as error:
            found.append(str(error))
    return found


def test_values_are_told_by_what_they_are(ranks):
    ((tanh, none, gelu, one, two, recipe, pair, kinds, spec, *refused),) = ranks(1)(told, "activation_func")
    assert gelu == "torch._C._nn.gelu" and tanh == {"partial": [gelu, [], {"approximate": "tanh"}]} != none
    assert one != two and "shifted" in str(one)
    assert recipe == "tensorwise" and pair == [1, "torch.bfloat16"]
    assert kinds == {"a": "torch.nn.modules.linear.Linear"}
    assert spec["class"].endswith("ModuleSpec") and spec["params"] == {"bias": False}
    for reason in refused:
        assert reason.startswith("the model's configuration: activation_func is "), refused
