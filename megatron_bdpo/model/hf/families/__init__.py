"""The families of models that can be trained here, and some that cannot, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bdpo.model.hf.families import (
    cohere,
    deepseek,
    ernie,
    exaone,
    gemma,
    glm,
    gpt_oss,
    granite,
    llama,
    olmo,
    phi,
    qwen,
)
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
    gemma.GEMMA2,
    gemma.GEMMA3_TEXT,
    phi.PHI3,
    olmo.OLMO2,
    olmo.OLMO3,
    granite.GRANITE,
    exaone.EXAONE4,
    cohere.COHERE2,
    ernie.ERNIE4_5,
    glm.GLM4,
    glm.GLM4_MOE,
    gpt_oss.GPT_OSS,
    deepseek.DEEPSEEK_V3,
    deepseek.KIMI_K2,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

_RECURRENT = "its recurrent layers cannot yet begin the answers to a prompt with the prompt's state"

#: Families that people will try, and why they cannot be trained here.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _RECURRENT),
    "nemotron_h": _RECURRENT,
    "gemma3": "it reads images, too; its language model alone can be, saved as Gemma3ForCausalLM (gemma3_text)",
    "ernie4_5_moe": "its router weighs experts by a softmax and chooses them with a bias beside it, which Megatron has "
    "for sigmoids alone",
}
