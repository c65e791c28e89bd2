"""The families of models that can be trained here, and some that cannot, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bdpo.model.hf.families import gemma, llama, olmo, qwen
from megatron_bdpo.model.hf.family import Family

_ALL = (
    llama.LLAMA,
    llama.MISTRAL,
    llama.MIXTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gemma.GEMMA,
    olmo.OLMO2,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

#: Families that people will try, and why they cannot be trained here.
REFUSED: Mapping[str, str] = {
    "gemma2": "its attention scores and logits are capped by tanh (attn_logit_softcapping, final_logit_softcapping), "
    "and it has norms behind attention and MLP, which Megatron's layers do not have",
    "gemma3_text": "it has norms behind attention and MLP, and another rotary base in every kind of layer",
    "gemma3": "it has norms behind attention and MLP, and another rotary base in every kind of layer",
    "qwen2_moe": "its shared expert has a gate of its own, which is not mapped",
    "phi3": "its projections are stored fused in another order, which is not mapped",
}
