"""The families of models that can be trained here, and some that cannot, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bdpo.model.hf.families import ernie, gemma, glm, llama, phi, qwen
from megatron_bdpo.model.hf.family import Family

_ALL = (
    llama.LLAMA,
    llama.SEED_OSS,
    llama.SMOLLM3,
    llama.MISTRAL,
    llama.MIXTRAL,
    qwen.QWEN2,
    qwen.QWEN2_MOE,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gemma.GEMMA,
    phi.PHI3,
    glm.GLM4_MOE,
    ernie.ERNIE4_5,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

#: Families that people will try, and why they cannot be trained here.
REFUSED: Mapping[str, str] = {
    "gemma2": "its attention scores and logits are capped by tanh (attn_logit_softcapping, final_logit_softcapping), "
    "and it has norms behind attention and MLP, which Megatron's layers do not have",
    "gemma3_text": "it has norms behind attention and MLP, and another rotary base in every kind of layer",
    "ernie4_5_moe": "its router weighs experts by a softmax and chooses them with a bias beside it, which Megatron has "
    "for sigmoids alone",
    "gemma3": "it has norms behind attention and MLP, and another rotary base in every kind of layer",
}
