"""Tiny random Hugging Face models, made by transformers itself, and their logits on the packs of a job."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.harness.jobs import run_job

VOCABULARY = 1030  # more than the example tokenizer's, and no multiple of anything: Megatron pads it

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": False,
}
_LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_PAD = {"pad_token_id": 0}  # theirs lie outside of the vocabulary
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GLM_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}

_DEEPSEEK = _GLM_MOE | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 64,
    },
}

#: Name -> transformers' class of the model, and settings beyond ``_SIZES``.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-4}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3.2": ("Llama", {"rope_theta": 500_000.0, "rope_scaling": _LLAMA_3, "head_dim": 32}),
    "llama linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "seed oss": ("SeedOss", {"attention_out_bias": False, "mlp_bias": True, "head_dim": 32} | _PAD),
    "smollm3": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 2} | _PAD),
    "smollm3 listed": ("SmolLM3", {"no_rope_layers": [0, 1, 1, 1], "attention_bias": True} | _PAD),
    "ernie 4.5": ("Ernie4_5", {"use_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 32, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2 sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3 biased": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "attention_bias": True,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "attention_bias": True,
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    # Their default token for padding is one of the texts' own here, and transformers gives its embedding no gradient.
    "olmo2": ("Olmo2", {"rope_theta": 5e5, "rms_norm_eps": 1e-4, "pad_token_id": None}),
    "olmo3": (
        "Olmo3",
        {
            "pad_token_id": None,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo3 yarn": (
        "Olmo3",
        {
            "attention_bias": True,
            "pad_token_id": None,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                    "rope_theta": 5e5,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 1.7,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-4,
        },
    ),
    "cohere2": (
        "Cohere2",
        {
            "attention_bias": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "logit_scale": 0.3,
            "layer_norm_eps": 1e-3,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
    ),
    "exaone4": ("Exaone4", {"head_dim": 32, "sliding_window": 9, "sliding_window_pattern": 3}),
    "glm4": ("Glm4", {"head_dim": 32, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-4, "pad_token_id": None}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.75, "sliding_window": 9} | _PAD),
    "phi3 longrope": (
        "Phi3",
        {
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 65_536,
            "original_max_position_embeddings": 2048,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
            },
        }
        | _PAD,
    ),
    "phi3 tied": ("Phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4} | _PAD),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 9,
            "swiglu_limit": 0.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen3 moe unnormed": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 32},
    ),
    "qwen3 moe mixed": ("Qwen3Moe", _QWEN_MOE | {"mlp_only_layers": [2], "head_dim": 32, "attention_bias": True}),
    "qwen2 moe": ("Qwen2Moe", _QWEN_MOE | {"shared_expert_intermediate_size": 40}),
    "qwen2 moe mixed": (
        "Qwen2Moe",
        _QWEN_MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "deepseek v3": ("DeepseekV3", _DEEPSEEK),
    "deepseek v3 moonlight": (
        "DeepseekV3",
        _DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-3, "rope_parameters": None},
    ),
    "glm4 moe": ("Glm4Moe", _GLM_MOE | {"attention_bias": True, "use_qk_norm": True, "head_dim": 32}),
    "glm4 moe grouped": ("Glm4Moe", _GLM_MOE | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}),
}


def make_config(name: str, **settings: Any) -> dict[str, Any]:
    """The ``config.json`` of one."""
    content: dict[str, Any] = json.loads(_config(name, settings).to_json_string(use_diff=False))
    return content


def _config(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    family, own = MODELS[name]
    return getattr(transformers, _config_of(family))(**(_SIZES | own | settings))


def make_model(name: str, directory: Path, **settings: Any) -> Path:
    """Write a random model in fp32. Weights are drawn wide, norms and biases too: errors in any of them shall show."""
    import transformers

    torch.manual_seed(7)
    config = _config(name, settings)
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config).float()
    with torch.no_grad():
        for key, value in itertools.chain(model.named_parameters(), _stored_buffers(model)):
            is_vector = value.dim() == 1 or key.endswith("_bias")  # or of every expert one
            value.add_(0.1 * torch.randn_like(value)) if is_vector else value.mul_(3)
    target = directory / name.replace(" ", "-")
    model.save_pretrained(target)
    return target


def _config_of(family: str) -> str:
    """Gemma 3 has images: its language model's configuration is a part."""
    return {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")


def _stored_buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Those that are in the file beside the parameters: experts' biases."""
    stored = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(directory: Path, template: str = TEMPLATE, **special_tokens: str) -> None:
    """Bytes as tokens, and the template's marks."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **special_tokens)
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = template
    fast.save_pretrained(directory)


def load_model(directory: Path) -> Any:
    """transformers' model of a directory, as an oracle."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


#: Of one sequence: its tokens, and the logits after each of them.
Sequence = tuple[np.ndarray, np.ndarray]

Mistake = Callable[[contextlib.ExitStack], None]
"""Breaks the code for as long as the stack is not unwound."""


def logits(flags: list[str], *, mistake: Mistake | None = None, **overrides: Any) -> list[Sequence]:
    """On the last rank: the logits of every sequence in the packs of a job's first scoring pass."""
    found: list[Sequence] = []
    with contextlib.ExitStack() as undo:
        if mistake is not None:
            mistake(undo)
        undo.enter_context(_logits_told(found.extend))
        run_job([*flags, "--no-share-prompts"], overrides, run_type=_scored_only())
    return found


def _scored_only() -> type[Any]:
    from megatron_bdpo.training.run import PreferenceRun

    class ScoredOnly(PreferenceRun):
        def after_load(self, model: list[Any]) -> None:
            super().after_load(model)
            raise SystemExit(0)

    return ScoredOnly


@contextlib.contextmanager
def _logits_told(tell: Callable[[list[Sequence]], None]) -> Any:
    """Inside the block, ``tell`` is called with the sequences of every pack that the last stage scores."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    from megatron_bdpo.model.pair_gpt import ScoringOutputLayer
    from megatron_bdpo.training import batches, forward

    score_pack, output, context_part = forward.score_pack, ScoringOutputLayer.forward, batches.context_part
    scored: list[Any] = []
    places: list[np.ndarray] = []

    def note_places(pack: Any, context: Any) -> Any:
        numbered = dataclasses.replace(pack, tokens=np.arange(len(pack.tokens)))
        places.append(context_part(numbered, context).tokens)
        return context_part(pack, context)

    def score(model: Any, batch: Any, *rest: Any) -> Any:
        scored.append(batch)
        return score_pack(model, batch, *rest)

    def forward_output(layer: Any, hidden: torch.Tensor, weight: Any, context: Any) -> Any:
        whole = gather_from_sequence_parallel_region(hidden) if layer.config.sequence_parallel else hidden
        local = context.scoring.shape(whole[:, 0] @ (layer.weight if weight is None else weight).T)
        tell(_sequences(scored[-1], places[len(scored) - 1], gather_from_tensor_model_parallel_region(local)))
        return output(layer, hidden, weight, context)

    with (
        mock.patch.object(batches, "context_part", note_places),
        mock.patch.object(forward, "score_pack", score),
        mock.patch.object(ScoringOutputLayer, "forward", forward_output),
    ):
        yield


def _sequences(batch: Any, places: np.ndarray, values: torch.Tensor) -> list[Sequence]:
    """A pack, of which this context-parallel rank has these places, cut where positions start again.

    Collective over the context-parallel ranks. What no run covers is padding, and last on every rank.
    """
    from megatron.core import parallel_state

    used = sum(batch.attention.query_lengths)
    own = (places, batch.tokens[0].numpy(), batch.attention.positions.numpy(), values.float().numpy())
    parts: list[Any] = [None] * parallel_state.get_context_parallel_world_size()
    torch.distributed.all_gather_object(
        parts, [each[:used] for each in own], group=parallel_state.get_context_parallel_group()
    )
    place, *whole = map(np.concatenate, zip(*parts, strict=True))
    tokens, positions, logits = (each[np.argsort(place)] for each in whole)
    starts = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    return [(tokens[first:stop], logits[first:stop]) for first, stop in itertools.pairwise(starts)]


@torch.no_grad()
def largest_difference(found: list[Sequence], model: Any) -> float:
    """The largest |logit - transformers' logit| over all sequences. Ours may have a padded vocabulary."""
    assert found
    worst = 0.0
    for tokens, values in found:
        expected = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
        worst = max(worst, float((torch.from_numpy(values[:, : expected.shape[1]]) - expected).abs().max()))
    return worst
