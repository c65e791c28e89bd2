"""``config.json`` to arguments and back: both spellings, and refusal by name of whatever is not understood."""

from __future__ import annotations

import re

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.config import exported, read_config, write_config
from megatron_bdpo.model.hf.families import FAMILIES

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
GEMMA = LLAMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "head_dim": 32}
#: Of layers of two kinds, with a window and attending to all.
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA2 = GEMMA | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
GEMMA3 = without(GEMMA, "rope_theta") | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
GRANITE = LLAMA | {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
EXAONE4 = LLAMA | {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"]}
OLMO3 = LLAMA | {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]}
OLMO2 = LLAMA | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def of(family, **settings):
    """A configuration of a family."""
    return LLAMA | {"model_type": family, "architectures": [FAMILIES[family].architecture]} | settings


def arguments(config, *names):
    found = read_config(config).arguments
    return tuple(found[name] for name in names)


@pytest.mark.parametrize("scaling", [None, LLAMA_3])
def test_both_spellings_of_rotary_settings(scaling):
    """Up to transformers 4 ``rope_theta`` and ``rope_scaling``, since then ``rope_parameters``."""
    old = LLAMA | {"rope_scaling": scaling}
    new = without(LLAMA, "rope_theta") | {
        "rope_parameters": {"rope_theta": 500_000.0, **(scaling or {"rope_type": "default"})}
    }
    names = ("rotary_base", "use_rope_scaling")
    assert arguments(old, *names) == arguments(new, *names) == (500_000, scaling is not None)
    if scaling:
        assert arguments(new, "rope_scaling_factor") == (32.0,)


def test_window_counts_the_token_itself():
    assert arguments(MISTRAL | {"sliding_window": 4096}, "window_size", "window_attn_skip_freq") == ((4095, 0), None)
    assert arguments(MISTRAL | {"sliding_window": None}, "window_size") == (None,)


def test_windows_of_some_layers():
    sliding = QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert arguments(sliding, "window_size", "window_attn_skip_freq") == ((7, 0), [0, 1])
    by_name = QWEN2 | {"sliding_window": 8, "use_sliding_window": True}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    assert arguments(by_name | kinds, "window_attn_skip_freq") == ([1, 0],)
    assert arguments(QWEN2 | {"sliding_window": 8, "max_window_layers": 0}, "window_size") == (None,)


def test_layers_of_two_kinds_where_a_file_does_not_name_them():
    names = "window_attn_skip_freq"
    assert arguments(GEMMA2 | {"num_hidden_layers": 4}, names) == ([1, 0, 1, 0],)
    assert arguments(OLMO3 | {"num_hidden_layers": 5}, names) == ([1, 1, 1, 0, 1],)
    assert arguments(GEMMA3 | {"num_hidden_layers": 7}, names) == ([1, 1, 1, 1, 1, 0, 1],)
    assert arguments(GEMMA3 | {"num_hidden_layers": 3, "sliding_window_pattern": 2}, names) == ([1, 0, 1],)
    four = EXAONE4 | {"num_hidden_layers": 4}
    assert arguments(four, names, "no_rope_freq") == ([1, 1, 1, 0], [0, 0, 0, 1])
    full = four | {"layer_types": ["full_attention"] * 4, "sliding_window": None, "sliding_window_pattern": "LLLG"}
    assert arguments(full, names, "no_rope_freq") == (None, None)


def test_rotary_positions_of_layers_of_two_kinds():
    """Gemma 3's releases have two bases side by side; since transformers 5 settings are by kind."""
    names = ("rotary_base", "local_rotary_base", "rotary_seq_len_interpolation_factor")
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = GEMMA3 | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": scaling}
    by_kind = {"full_attention": scaling | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    new = GEMMA3 | {"rope_parameters": by_kind}
    assert arguments(old, *names) == arguments(new, *names) == (500_000, 20_000, 8)
    assert arguments(GEMMA3, *names) == (1_000_000, 10_000, None)
    assert arguments(GEMMA3 | {"layer_types": ["full_attention"] * 2}, *names) == (1_000_000, None, None)
    assert arguments(OLMO3, *names) == (500_000, None, None), "one table is enough where all have the same"
    assert arguments(OLMO3 | {"rope_parameters": by_kind}, *names) == (500_000, 20_000, 8)


def test_scales_and_caps():
    names = ("attention_scale", "attention_softcap", "logit_softcap")
    assert arguments(GEMMA2, *names) == (1 / 16, 50.0, 30.0)
    capless = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 144}
    assert arguments(GEMMA2 | capless, *names) == (1 / 12, None, None)
    assert arguments(GEMMA3, *names) == (1 / 16, None, None)
    names = ("attention_scale", "embedding_multiplier", "residual_multiplier", "logit_scale")
    assert arguments(GRANITE, *names) == (1.0, None, None, None)
    scales = {"attention_multiplier": 0.0078125, "embedding_multiplier": 12, "residual_multiplier": 0.22}
    assert arguments(GRANITE | scales | {"logits_scaling": 16}, *names) == (0.0078125, 12.0, 0.22, 0.0625)


def test_absent_keys_mean_what_transformers_means():
    assert arguments(without(LLAMA, "rope_theta"), "rotary_base") == (10_000,)
    assert arguments(without(LLAMA, "num_key_value_heads"), "num_query_groups") == (4,)
    assert arguments(MISTRAL, "window_size") == ((4095, 0),)
    assert arguments(without(GEMMA, "tie_word_embeddings"), "untie_embeddings_and_output_weights") == (False,)
    assert arguments(QWEN3_MOE, "moe_router_pre_softmax") == (True,)


REFUSED = {
    "unknown family": (
        LLAMA | {"model_type": "mamba"},
        "'mamba' (model_type) cannot be trained here: not mapped. Families that can: ",
    ),
    "images": (LLAMA | {"model_type": "gemma3"}, "'gemma3' cannot be trained here: it reads images, too; its language"),
    "gemma 3 with a cap of scores": (
        GEMMA3 | {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0, which models of the family 'gemma3_text' cannot have here",
    ),
    "kinds of layers without a pattern": (
        EXAONE4 | {"sliding_window_pattern": "LLLG"},
        "sliding_window_pattern is 'LLLG', and there are no layer_types",
    ),
    "scaled positions of layers with a window": (
        GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "positions of layers with a window are not scaled here",
    ),
    "rotary settings not by kind": (
        GEMMA3 | {"rope_parameters": {"rope_theta": 1e6}},
        "settings of sliding_attention and of full_attention are expected",
    ),
    "a base that releases read in two ways": (OLMO3 | {"rope_theta": 1e6}, "do not agree on whether"),
    "a classifier": (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "is no language model"),
    "a key of another architecture": (
        LLAMA | {"logit_scale": 0.5},
        "logit_scale is 0.5, which models of the family 'llama' cannot have here. Possible: 1, None.",
    ),
    "a key of another family": (LLAMA | {"sliding_window": 8}, "sliding_window is 8, which"),
    "biases": (MISTRAL | {"attention_bias": True}, "attention_bias is True, which"),
    "rotary positions by layer": (of("smollm3", no_rope_layers=[1, 2]), "no_rope_layers must be 2 times 0 or 1"),
    "recurrent layers": (
        LLAMA | {"model_type": "qwen3_next"},
        "'qwen3_next' cannot be trained here: its recurrent layers",
    ),
    "a softmax with a bias": (LLAMA | {"model_type": "ernie4_5_moe"}, "its router weighs experts by a softmax"),
    "activation": (LLAMA | {"hidden_act": "relu"}, "hidden_act is 'relu', which"),
    "no size": (without(LLAMA, "hidden_size"), "hidden_size must be a positive whole number, not None"),
    "shared keys beside latents": (
        of("deepseek_v3", num_hidden_layers=4, num_key_value_heads=2),
        "num_key_value_heads is 2, num_attention",
    ),
    "half of yarn's scales": (
        of("deepseek_v3", num_hidden_layers=4, num_key_value_heads=4, rope_scaling=YARN | {"mscale_all_dim": 1.0}),
        "mscale and mscale_all_dim are there together or not at all",
    ),
    "a latent of no width": (of("deepseek_v3", kv_lora_rank=0), "kv_lora_rank must be a positive whole number, not 0"),
    "longrope": (
        LLAMA | {"rope_scaling": {"type": "longrope", "factor": 4.0}},
        "rotary scaling of the kind 'longrope'",
    ),
    "yarn without a length": (
        LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "yarn's original_max_position_embeddings must be a positive whole number",
    ),
    "yarn with a factor of its own": (
        LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.5}},
        "yarn's attention_factor is 1.5; Megatron computes it from the other settings as 1.13863",
    ),
    "another Llama 3": (
        LLAMA | {"rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 4096}},
        "'original_max_position_embeddings': 4096}. Megatron's code has {'low_freq_factor': 1",
    ),
    "part of a head rotated": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "unknown rotary setting": (
        LLAMA | {"rope_parameters": {"rope_type": "default", "attention_factor": 2.0}},
        "{'attention_factor': 2.0} are not known",
    ),
    "rotary settings by layer": (
        LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "differ between layers (full_attention)",
    ),
    "windows without size": (
        QWEN2 | {"layer_types": ["sliding_attention"] * 2},
        "layer_types has sliding_attention, but there is no sliding_window",
    ),
    "experts without layers": (QWEN3_MOE | {"mlp_only_layers": [0, 1]}, "there are experts, but no layer has them"),
    "groups of experts": (
        of("glm4_moe", n_group=4, topk_group=2),
        "n_group 4, topk_group 2: Megatron scores a group by its best num_experts_per_tok / topk_group experts",
    ),
    "factors of another head": (
        of("phi3", rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        "longrope's short_factor must be 8 positive numbers, not [1.0]",
    ),
    "dropout": (of("phi3", resid_pdrop=0.1), "resid_pdrop is 0.1, which"),
    "more than a head rotated": (of("phi3", partial_rotary_factor=1.5), "must lie between 0 and 1, not 1.5"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(config)


CONFIGS = {
    "llama": LLAMA,
    "llama 3": LLAMA | {"rope_scaling": LLAMA_3},
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": QWEN2 | {"rope_scaling": YARN | {"attention_factor": 1.138629436}},
    "yarn with two scales": QWEN2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}},
    "llama biased": LLAMA | {"attention_bias": True},
    "llama biased MLP": LLAMA | {"mlp_bias": True},
    "seed_oss": of("seed_oss", mlp_bias=True),
    "seed_oss biased": of("seed_oss", attention_out_bias=True),
    "smollm3": of("smollm3", no_rope_layer_interval=2),
    "smollm3 sliding": of("smollm3", no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=8),
    "ernie4_5": of("ernie4_5", use_bias=True),
    "mistral": MISTRAL | {"sliding_window": 8},
    "qwen2 sliding": QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": of("qwen3", attention_bias=True),
    "qwen2": QWEN2,
    "gemma": GEMMA,
    "gemma2": GEMMA2 | KINDS,
    "gemma2 without caps": GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3": GEMMA3 | KINDS | {"rope_local_base_freq": 2e4, "query_pre_attn_scalar": 168},
    "granite": GRANITE
    | {"mlp_bias": True, "logits_scaling": 13.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625},
    "exaone4": EXAONE4 | KINDS,
    "olmo2": OLMO2 | {"attention_bias": True},
    "olmo3": OLMO3 | KINDS,
    "olmo3, yarn": OLMO3 | KINDS | {"rope_scaling": YARN},
    "olmo3, two bases": OLMO3
    | KINDS
    | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": of("gpt_oss", num_local_experts=4),
    "deepseek_v3": of(
        "deepseek_v3",
        num_hidden_layers=4,
        num_key_value_heads=4,
        rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "moonlight": of(
        "deepseek_v3", num_hidden_layers=4, num_key_value_heads=None, q_lora_rank=None, n_group=1, topk_group=1
    ),
    "kimi_k2": of("kimi_k2", num_key_value_heads=4, n_shared_experts=2, first_k_dense_replace=1),
    "mixtral": of("mixtral", num_local_experts=4),
    "qwen3_moe mixed": QWEN3_MOE | {"mlp_only_layers": [0]},
    "qwen2_moe": of("qwen2_moe", num_experts=4, decoder_sparse_step=2),
    "phi3": of("phi3", partial_rotary_factor=0.75, sliding_window=9),
    "cohere2": of("cohere2", logit_scale=0.25, layer_norm_eps=1e-6) | KINDS,
    "glm4": of("glm4", attention_bias=False, partial_rotary_factor=0.25),
    "glm4_moe": of("glm4_moe", attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5),
    "glm4_moe in groups": of("glm4_moe", n_group=8, topk_group=4, first_k_dense_replace=0, n_shared_experts=0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_back_and_forth(config):
    architecture = read_config(config)
    written = write_config(config["model_type"], architecture.arguments, config["vocab_size"])
    assert read_config(written) == architecture


def test_layers_without_rotary_positions():
    names = ("no_rope_freq", "window_size", "window_attn_skip_freq")
    assert arguments(of("smollm3", no_rope_layer_interval=2), *names) == ([0, 1], None, None)
    assert arguments(CONFIGS["smollm3 sliding"], *names) == ([1, 0], (7, 0), [1, 0])
    by_name = of("smollm3", sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention"] * 2)
    assert arguments(by_name, *names) == (None, (7, 0), None)


def test_biases_of_some_projections():
    names = ("add_qkv_bias", "attention_output_bias", "mlp_bias", "add_bias_linear")
    assert arguments(CONFIGS["llama biased"], *names) == (True, True, False, False)
    assert arguments(CONFIGS["seed_oss"], *names) == (True, False, True, False)
    assert arguments(CONFIGS["ernie4_5"], *names) == (True, True, True, False)
    assert arguments(CONFIGS["glm4_moe"], *names) == (True, False, False, False)


def test_longrope_of_short_sequences():
    """Phi-3-mini-128k's early name for it; by transformers' formula sqrt(1 + ln 32 / ln 4096)."""
    factors = [1.0 + 0.1 * number for number in range(8)]
    scaling = {"type": "su", "short_factor": factors, "long_factor": [2.0] * 8}
    config = of("phi3", rope_scaling=scaling, max_position_embeddings=131_072)
    names = ("rotary_factors", "rotary_attention_factor", "rotary_factors_until")
    assert arguments(config, *names) == (factors, pytest.approx(1.190238), 4096)


def test_experts_in_some_layers():
    names = ("moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "ffn_hidden_size")
    assert arguments(CONFIGS["qwen2_moe"], *names) == ([0, 1], 5632, 1408, 96)
    assert arguments(CONFIGS["glm4_moe"], *names) == ([0, 1], 1408, 1408, 96)
    assert arguments(CONFIGS["glm4_moe in groups"], *names) == (1, None, 1408, 96)


def test_dropout_is_left_out_with_a_remark():
    found = read_config(of("seed_oss", attention_dropout=0.1, residual_dropout=0.1))
    assert found.remark.startswith("config.json: attention_dropout, residual_dropout: left out, as in evaluation")
    assert read_config(of("seed_oss", attention_dropout=0.0)).remark == ""


def test_layers_that_predict_further_tokens_are_left_out():
    found = read_config(of("glm4_moe", num_nextn_predict_layers=1))
    assert found.left_out == ("model.layers.2.",)
    assert "layers for multi-token prediction (1) are neither trained nor exported" in found.remark
    assert exported({"num_nextn_predict_layers": 1}, "bfloat16") == {"num_nextn_predict_layers": 0, "dtype": "bfloat16"}


def test_arguments_that_no_model_of_the_family_has():
    arguments = read_config(QWEN2).arguments
    with pytest.raises(UserError, match="no model of the family 'mistral' has these settings: add_qkv_bias: True, but"):
        write_config("mistral", arguments, 1000)


def test_every_megatron_row_comes_from_one_place():
    """The rules cut every Hugging Face tensor into ranges that cover it exactly once, in every family."""
    for config in CONFIGS.values():
        weights = read_config(config).weights
        covered: dict[str, int] = {}
        for key, rule in weights.rules.items():
            if key.endswith("pre_mlp_layernorm.weight"):
                continue  # Transformer Engine's name for another rule's tensor
            for indices in weights._indices(key, rule):
                for part in rule.parts(weights.sizes, dict(zip(("layer", "expert"), indices, strict=False))):
                    covered[part.name] = covered.get(part.name, 0) + part.stop - part.start
        assert covered == {name: shape[0] for name, shape in weights.shapes().items()}
    assert {config["model_type"] for config in CONFIGS.values()} == FAMILIES.keys()
