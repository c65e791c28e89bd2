"""What families of models have in common: what one is, and the tensors and settings that most are made of.

A family says what Megatron's arguments cannot say by themselves, what a key that is absent from its ``config.json``
means, and which values of a key its layers here cannot honour. How keys become arguments is in ``config``; the families
themselves are in ``families``, a file for each lineage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.tensors import Dimensions, Rule

Config = Mapping[str, Any]

# Tensors --------------------------------------------------------------------------------------------------------------

_LAYER = "model.layers.{layer}."

_OUTSIDE = {
    "embedding.word_embeddings.weight": Rule({"model.embed_tokens.weight": "vocab"}, "hidden"),
    "decoder.final_layernorm.weight": Rule({"model.norm.weight": "hidden"}),
}

#: Where input and output embeddings are one, this tensor does not exist.
OUTPUT_LAYER = "output_layer.weight"
#: In the output layer's place in a reward model: its scalar head. See ``model.reward_head``.
REWARD_HEAD = "reward_head.weight"
_OUTPUT = {OUTPUT_LAYER: Rule({"lm_head.weight": "vocab"}, "hidden")}


def tensors(*of_a_layer: Mapping[str, Rule]) -> dict[str, Rule]:
    """The tensors of a model whose layers have these; names are within a layer, on both sides."""
    in_layers = {
        f"decoder.layers.{key}": dataclasses.replace(
            rule, rows={_LAYER + name: size for name, size in rule.rows.items()}
        )
        for rules in of_a_layer
        for key, rule in rules.items()
    }
    return _OUTSIDE | in_layers | _OUTPUT


def fused_qkv(kind: str, columns: str | None) -> Rule:
    projections = {"q": "queries", "k": "keys", "v": "keys"}
    return Rule({f"self_attn.{name}_proj.{kind}": size for name, size in projections.items()}, columns, "groups")


#: Without norms of hidden states.
PROJECTIONS = {
    "self_attention.linear_qkv.weight": fused_qkv("weight", "hidden"),
    "self_attention.linear_proj.weight": Rule({"self_attn.o_proj.weight": "hidden"}, "queries"),
}
ATTENTION = {"self_attention.linear_qkv.layer_norm_weight": Rule({"input_layernorm.weight": "hidden"}), **PROJECTIONS}
QKV_BIAS = {"self_attention.linear_qkv.bias": fused_qkv("bias", None)}
OUTPUT_BIAS = {"self_attention.linear_proj.bias": Rule({"self_attn.o_proj.bias": "hidden"})}
QK_NORM = {
    "self_attention.q_layernorm.weight": Rule({"self_attn.q_norm.weight": "head"}),
    "self_attention.k_layernorm.weight": Rule({"self_attn.k_norm.weight": "head"}),
}
#: Without a norm.
GATED = {
    "mlp.linear_fc1.weight": Rule({"mlp.gate_proj.weight": "ffn", "mlp.up_proj.weight": "ffn"}, "hidden"),
    "mlp.linear_fc2.weight": Rule({"mlp.down_proj.weight": "hidden"}, "ffn"),
}

MLP_BIAS = {
    "mlp.linear_fc1.bias": Rule({"mlp.gate_proj.bias": "ffn", "mlp.up_proj.bias": "ffn"}),
    "mlp.linear_fc2.bias": Rule({"mlp.down_proj.bias": "hidden"}),
}


def bias_rules(values: Config) -> dict[str, Rule]:
    """The biases that :func:`bias_arguments` says there are."""
    on = bias_arguments(values)
    return {
        **(QKV_BIAS if on["add_qkv_bias"] else {}),
        **(OUTPUT_BIAS if on["attention_output_bias"] else {}),
        **(MLP_BIAS if on["mlp_bias"] else {}),
    }


def bias_arguments(values: Config) -> dict[str, bool]:
    """Of families that choose biases: ``attention_bias`` is of four projections, or of three beside
    ``attention_out_bias``."""
    attention = bool(values["attention_bias"])
    return {
        "add_qkv_bias": attention,
        "attention_output_bias": bool(values.get("attention_out_bias", attention)),
        "mlp_bias": bool(values.get("mlp_bias")),
    }


def gated_mlp(norm: str) -> dict[str, Rule]:
    """With the norm in front of it, by its name there."""
    return {"mlp.linear_fc1.layer_norm_weight": Rule({f"{norm}.weight": "hidden"}), **GATED}


MLP = gated_mlp("post_attention_layernorm")


def norms_behind(attention: str, mlp: str) -> dict[str, Rule]:
    """Of layers whose ``layer_norms`` are "after" or "around", by their names there."""
    names = {"post_self_attn_layernorm": attention, "post_mlp_layernorm": mlp}
    return {f"{key}.weight": Rule({f"{name}.weight": "hidden"}) for key, name in names.items()}


def experts(block: str, gate: str, up: str, down: str) -> dict[str, Rule]:
    expert = block + ".experts.{expert}."
    norm = Rule({"post_attention_layernorm.weight": "hidden"})
    return {
        "mlp.linear_fc1.layer_norm_weight": norm,  # of local layers
        "pre_mlp_layernorm.weight": norm,  # of Transformer Engine's
        "mlp.router.weight": Rule({f"{block}.gate.weight": "experts"}, "hidden", layers="sparse"),
        "mlp.experts.experts.linear_fc1.weight": Rule(
            {f"{expert}{gate}.weight": "expert_ffn", f"{expert}{up}.weight": "expert_ffn"}, "hidden", layers="sparse"
        ),
        "mlp.experts.experts.linear_fc2.weight": Rule(
            {f"{expert}{down}.weight": "hidden"}, "expert_ffn", layers="sparse"
        ),
    }


def shared_expert(block: str) -> dict[str, Rule]:
    """Of the layers that have experts, the one that every token has."""
    return {
        "mlp.shared_experts.linear_fc1.weight": Rule(
            {f"{block}.gate_proj.weight": "shared_ffn", f"{block}.up_proj.weight": "shared_ffn"},
            "hidden",
            layers="sparse",
        ),
        "mlp.shared_experts.linear_fc2.weight": Rule(
            {f"{block}.down_proj.weight": "hidden"}, "shared_ffn", layers="sparse"
        ),
    }


#: The MLPs of the layers that have no experts.
DENSE_MLP = {key: dataclasses.replace(rule, layers="dense") for key, rule in MLP.items() if "norm" not in key}
SHARED_EXPERT_GATE = {
    "mlp.shared_experts.gate_weight": Rule({"mlp.shared_expert_gate.weight": "one"}, "hidden", layers="sparse")
}
EXPERT_BIAS = {
    "mlp.router.expert_bias": Rule({"mlp.gate.e_score_correction_bias": "experts"}, layers="sparse"),
}


# Settings -------------------------------------------------------------------------------------------------------------

SILU = {"hidden_act": ("silu",)}
#: Of families whose layers have the part always, whatever the key says.
QKV_BIAS_ALWAYS = dict.fromkeys(("attention_bias", "qkv_bias"), (True, False, None))
QK_NORM_ALWAYS = dict.fromkeys(("use_qk_norm", "qk_layernorm"), (True, None))
ALL_LAYERS_SPARSE = {"mlp_layer_types": ("sparse", None)}
#: Keys of families whose first layers, or any, have no experts; "dense" rules need ``DENSE_MLP``.
SOME_LAYERS_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": None}
SIGMOID_ROUTER_ARGUMENTS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": False,
    "moe_router_dtype": "fp32",
}
"""Of families whose routers choose by a sigmoid and a bias of each expert, and weigh by the sigmoid alone."""
SIGMOID_ROUTER = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "n_shared_experts": 0,
}
"""Keys of the same."""
SOME_LAYERS_SLIDE = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


# A family -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What the models of one ``model_type`` have in common."""

    model_type: str
    architecture: str
    """The one in ``architectures`` that is a language model."""
    rules: Mapping[str, Rule] | Callable[[Config], Mapping[str, Rule]]
    """The tensors, by Megatron's names without numbers; a function of the configuration where it decides which there
    are."""
    models: str = ""
    """Some of them, by the names they are known by."""
    layers: str = ""
    """What they have that Llama's have not, in a few words."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Megatron's, beyond those that all families share."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What an absent key of ``config.json`` means, where it is not as in ``config.DEFAULTS``; these keys are read."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys whose other values the layers here do not have, where it is not as in ``keys.FIXED``."""
    spelling: Callable[[Config], Config] = lambda values: values
    """The same configuration with keys as other families have them, defaults included; before anything reads it."""
    own_arguments: Callable[[Config], Mapping[str, Any]] = lambda values: {}
    """Megatron's arguments from what the family reads and others do not. It is given every key that is translated, with
    the family's defaults, and its arguments go before the others."""
    own_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda arguments: {}
    """The way back: keys of ``config.json`` from Megatron's arguments."""
    exported_as: str = ""
    """The ``model_type`` that exports have, where transformers does not know this one."""
    own_sizes: Callable[[Config], Mapping[str, Any]] = lambda values: {}
    """Fields of ``Dimensions`` that others do not have."""
    own_code: tuple[str, ...] = ()
    """How code is called that published files bring along, and that computes what transformers' own class does."""
    unpack: Callable[[HuggingFaceCheckpoint, Dimensions], HuggingFaceCheckpoint] | None = None
    """Of a family whose files do not hold the tensors that ``rules`` name: presents those, see ``packed``."""
    pack: Callable[[HuggingFaceCheckpoint, Dimensions], HuggingFaceCheckpoint] | None = None
    """The way back, of a directory that holds the tensors that ``rules`` name."""
    dequantised: frozenset[str] = frozenset()
    """Methods of ``quantization_config`` that ``unpack`` undoes. Exports are not quantised."""
    no_adapters: str = ""
    """Why adapters cannot stand beside its layers; empty where they can."""

    def rules_of(self, values: Config) -> Mapping[str, Rule]:
        """The tensors of a model with this configuration, its defaults included."""
        return self.rules(values) if callable(self.rules) else self.rules
