"""Keys of ``config.json``: real files are taken, keys without effect are named in one line, what matters is refused.

``hub_configs.json`` holds the keys and values of files on the hub, with the public repository that each was read from.
``transformers_keys.json`` holds the keys that transformers' code declares or reads, by release, from its wheels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf import keys
from megatron_bdpo.model.hf.config import DROPOUTS, read_config
from megatron_bdpo.model.hf.families import FAMILIES
from tests.harness import transformers_source
from tests.hf.test_config import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3_MOE, of

HUB = json.loads(Path(__file__).with_name("hub_configs.json").read_text())
RECORD = json.loads(Path(__file__).with_name("transformers_keys.json").read_text())

MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
CONFIGS = {name: of(name, hidden_act=family.only["hidden_act"][0]) for name, family in FAMILIES.items()}
for name in ("deepseek_v3", "kimi_k2"):
    CONFIGS[name] |= {"num_key_value_heads": 4, "num_hidden_layers": 4}

REMARK = "config.json: without effect, as transformers' code of '{}' does not read it: {}"


def known(family: str) -> frozenset[str]:
    table = FAMILIES[family]
    return keys.TRANSLATED | keys.GENERAL | keys.CHECKED | keys.FIXED.keys() | table.defaults.keys() | table.only.keys()


# Real files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", HUB, ids=[entry["model"] for entry in HUB])
def test_files_of_the_hub(entry):
    config = entry["config"]
    if "refused" in entry:
        with pytest.raises(UserError, match=re.escape(entry["refused"])):
            read_config(config)
    else:
        expected = entry["without_effect"]
        remark = REMARK.format(config["model_type"], ", ".join(expected)) if expected else ""
        found, _, further = read_config(config).remark.partition("\n")
        if not expected:
            found, further = "", found
        assert found == remark
        assert bool(further) is bool(config.get("num_nextn_predict_layers"))


def test_there_are_enough_of_them():
    accepted = {entry["model"]: entry["config"]["model_type"] for entry in HUB if "without_effect" in entry}
    assert len(accepted) >= 30
    assert len(set(accepted.values())) >= 8
    assert all(entry["read_from"] for entry in HUB)


def test_an_unmapped_family_is_named_and_the_mapped_ones_listed():
    for entry in HUB:
        if entry["config"]["model_type"] not in FAMILIES:
            with pytest.raises(UserError) as refusal:
                read_config(entry["config"])
            assert f"'{entry['config']['model_type']}'" in str(refusal.value)
            assert str(refusal.value).endswith(f"Families that can: {', '.join(sorted(FAMILIES))}.")


# What transformers reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_key_that_a_release_of_transformers_reads_is_known(family):
    assert {**RECORD["shared"], **RECORD[family]}.keys() - known(family) == set()


def test_the_record_reaches_the_newest_known_release():
    newest = RECORD["releases"][-1].split(".")
    assert tuple(map(int, newest[:2])) == keys.KNOWN_RELEASE
    assert RECORD.keys() == {"releases", "shared", *FAMILIES}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_key_that_the_installed_transformers_reads_is_known(family):
    package = Path(pytest.importorskip("transformers").__file__).parent
    read = transformers_source.keys(package, family) | transformers_source.shared_keys(package)
    assert len(read) > 60  # the sources are where they are looked for
    assert read - known(family) == set()


def test_the_parser_sees_every_way_to_read_a_key(tmp_path):
    folder = tmp_path / "models" / "some"
    folder.mkdir(parents=True)
    (tmp_path / "configuration_utils.py").write_text("class C:\n def a_method(self): pass\n")
    (folder / "configuration_some.py").write_text(
        "class SomeConfig(C):\n"
        " attribute_map = {'by_map': 'field'}\n"
        " field: int = 1\n"
        " def __init__(self, argument, **kwargs):\n"
        "  self.attribute = kwargs.pop('popped', None)\n"
    )
    (folder / "modeling_some.py").write_text(
        "def f(self, config, other):\n"
        " config.a_method(config.direct, self.config.through_self, other.no_key)\n"
        " if hasattr(config, 'asked_for'): return getattr(self.config, 'got', 1)\n"
    )
    expected = {"by_map", "field", "argument", "attribute", "popped", "direct", "through_self", "asked_for", "got"}
    assert transformers_source.keys(tmp_path, "some") - {"kwargs"} == expected


# Keys without effect -------------------------------------------------------------------------------------------------


def test_one_line_names_all_keys_without_effect():
    unread = {"_model_name_or_path": "x", "activation": "swiglu", "transformers.js_config": {}}
    config = LLAMA | unread | {"unk_token_id": 0, "rope_interleaved": False}
    remark = REMARK.format("llama", "_model_name_or_path, activation, transformers.js_config")
    assert read_config(config).remark == remark
    assert read_config(config) == read_config(LLAMA)


def test_a_name_with_line_breaks_stays_in_the_line():
    remark = read_config(LLAMA | {"a\nb": 1, "c" * 500: 2}).remark
    assert remark == REMARK.format("llama", r"'a\nb', " + repr("c" * 500)[:60] + "...")


def test_another_familys_key_is_not_taken_for_ones_own():
    for config, extra in (
        (LLAMA, {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_local_experts": 0}),
        (MISTRAL, {"use_sliding_window": False, "max_window_layers": 1}),
        (MIXTRAL, {"moe_intermediate_size": 8}),
        (GEMMA, {"num_experts_per_tok": 2}),
    ):
        assert read_config(config | extra) == read_config(config)


def test_what_a_later_release_wrote_may_be_read_there():
    later = LLAMA | {"transformers_version": "5.999.0"}
    assert read_config(later).remark == ""
    with pytest.raises(UserError, match=r"config.json: new_key: not known, and transformers '5.999.0' wrote"):
        read_config(later | {"new_key": 1})
    assert "new_key" in read_config(LLAMA | {"transformers_version": "5.24.1", "new_key": 1}).remark


# Keys that matter ----------------------------------------------------------------------------------------------------

#: Values with which models are published.
MUTANTS = {
    "is_causal": False,
    "use_bidirectional_attention": True,
    "attention_chunk_size": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.0078125,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "clip_qkv": 8.0,
    "alibi": True,
    "partial_rotary_factor": 0.5,
    "rope_interleaved": True,
    "no_rope_layers": [1, 1, 1, 0],
    "mlp_bias": True,
    "attention_out_bias": True,
    "attention_dropout": 0.1,
    "use_parallel_residual": True,
    "kv_lora_rank": 512,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "shared_expert_intermediate_size": 5632,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "num_kv_shared_layers": 4,
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "block_configs": [{"attention": {"no_op": True}}],
    "vision_config": {"hidden_size": 1024},
    "text_config": {"hidden_size": 64},
    "transformers_weights": "other.safetensors",
    "attribute_map": {"hidden_size": "width"},
}


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        pytest.param(name, key, value, id=f"{key}-{name}")
        for key, value in MUTANTS.items()
        for name, family in sorted(FAMILIES.items())
        if key not in family.defaults and value not in family.only.get(key, ())
    ],
)
def test_a_key_of_another_architecture_is_refused(family, key, value):
    with pytest.raises(UserError, match=re.escape(f"config.json: {key} is ")):
        read_config(CONFIGS[family] | {key: value})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_fixed_key_takes_its_values_and_no_other(family):
    table = FAMILIES[family]
    for key, possible in {**keys.FIXED, **table.only}.items():
        if key in table.defaults and key not in table.only:
            continue
        with pytest.raises(UserError, match=re.escape(f"config.json: {key} ")):
            read_config(CONFIGS[family] | {key: "something else"})
        for value in possible:
            if not (value and key in DROPOUTS):
                assert read_config(CONFIGS[family] | {key: value}).remark == ""


def test_keys_that_one_family_has_and_another_has_not():
    for config, key, value in (
        (LLAMA, "sliding_window", 4096),
        (LLAMA, "use_sliding_window", True),
        (LLAMA, "layer_types", ["full_attention", "sliding_attention"]),
        (LLAMA, "num_local_experts", 8),
        (LLAMA, "qk_layernorm", True),
        (MISTRAL, "attention_bias", True),
        (MIXTRAL, "norm_topk_prob", False),
        (MIXTRAL, "num_experts", 8),
        (QWEN3, "use_qk_norm", False),
        (MIXTRAL, "mlp_only_layers", [0]),
        (MIXTRAL, "decoder_sparse_step", 2),
        (QWEN3_MOE, "mlp_layer_types", ["dense", "sparse"]),
    ):
        with pytest.raises(UserError, match=re.escape(f"config.json: {key} is ")):
            read_config(config | {key: value})
    for config, key, value in (
        (LLAMA, "layer_types", ["full_attention"] * 2),
        (QWEN2, "attention_bias", True),
        (QWEN2, "qkv_bias", True),
        (QWEN3, "use_qk_norm", True),
        (QWEN3_MOE, "mlp_layer_types", ["sparse", "sparse"]),
    ):
        assert read_config(config | {key: value}) == read_config(config)


def test_the_original_length_beside_the_rotary_settings_goes_first():
    """transformers 5 takes it where both are there."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inside = LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 8192}}
    beside = LLAMA | {"rope_scaling": scaling, "original_max_position_embeddings": 8192}
    assert read_config(inside) == read_config(beside)
    with pytest.raises(UserError, match="'original_max_position_embeddings': 4096"):
        read_config(inside | {"original_max_position_embeddings": 4096})


# Quantised weights and code of one's own -----------------------------------------------------------------------------

NO_WAY, BY_CALL, BY_SETTING = "transformers cannot dequantise it", ".dequantize()", "(dequantize=True)"
QUANTISED = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, NO_WAY),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}, NO_WAY),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, BY_CALL),
    "early bitsandbytes": ({"load_in_8bit": True}, BY_CALL),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, BY_SETTING),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, BY_SETTING),
    "no object": ("int4", NO_WAY),
}


@pytest.mark.parametrize(("settings", "way"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_are_refused_with_the_way_out(settings, way):
    with pytest.raises(UserError) as refusal:
        read_config(LLAMA | {"quantization_config": settings})
    cause, advice = refusal.value.as_text().split("\nadvice: ")
    assert cause.startswith("error: config.json: quantization_config: the weights are quantised")
    assert advice.startswith("Name the model that it was made from") and way in advice


@pytest.mark.parametrize("key", ["quantization", "compression_config"])
def test_other_names_for_it(key):
    with pytest.raises(UserError, match=f"config.json: {key}: the weights are quantised"):
        read_config(LLAMA | {key: {"group_size": 64, "bits": 4}})


@pytest.mark.parametrize("settings", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": False}])
def test_weights_that_are_not_quantised_after_all(settings):
    assert read_config(LLAMA | {"quantization_config": settings}) == read_config(LLAMA)


def test_the_ways_out_are_transformers_own():
    auto = pytest.importorskip("transformers.quantizers.auto")
    base = auto.HfQuantizer._dequantize
    for method, way in keys._DEQUANTISED.items():
        if ".dequantize()" in way:
            assert all(auto.AUTO_QUANTIZER_MAPPING[f"{method}_{bits}bit"]._dequantize is not base for bits in (4, 8))
        else:
            settings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            assert f"={settings.__name__}(dequantize=True)" in way
    for method in ("awq", "gptq"):
        assert auto.AUTO_QUANTIZER_MAPPING[method]._dequantize is base
        assert not hasattr(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method](bits=4), "dequantize")


def test_code_beside_the_file_is_refused_unless_it_is_the_tokenizers():
    with pytest.raises(UserError, match=r"auto_map: the model brings code of its own \(\['modeling.M'\]\)"):
        read_config(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling.M", "AutoTokenizer": ["t.T", None]}})
    assert read_config(LLAMA | {"auto_map": {"AutoTokenizer": ["t.T", None]}}).remark == ""


def test_the_first_conversions_of_llama():
    assert read_config(LLAMA | {"architectures": ["LLaMAForCausalLM"]}) == read_config(LLAMA)
    assert read_config(of("ernie4_5", architectures=["Ernie4_5_ForCausalLM"])) == read_config(of("ernie4_5"))
