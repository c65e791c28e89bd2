"""The families of models that can be trained here, and some that cannot, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bdpo.model.hf.families import exaone, gemma, gpt_oss, granite, llama, olmo, qwen
from megatron_bdpo.model.hf.family import Family

_ALL = (
    llama.LLAMA,
    llama.MISTRAL,
    llama.MIXTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3_TEXT,
    granite.GRANITE,
    olmo.OLMO2,
    olmo.OLMO3,
    exaone.EXAONE4,
    gpt_oss.GPT_OSS,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

#: Families that people will try, and why they cannot be trained here.
REFUSED: Mapping[str, str] = {
    "gemma3": "it reads images, too; its language model alone can be, saved as Gemma3ForCausalLM (gemma3_text)",
    "qwen2_moe": "its shared expert has a gate of its own, which is not mapped",
    "phi3": "its projections are stored fused in another order, which is not mapped",
}
