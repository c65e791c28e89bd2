"""Megatron's GPT model, made to read packed pair groups: config, builder, and the one override it needs.

This is the only file that names GPTModel (Megatron announces its replacement by HybridModel).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_bdpo.logprobs import ScoredPositions, TokenScoring, sequence_log_probs
from megatron_bdpo.model.attention import AttentionPlan, PairAttention
from megatron_bdpo.model.norm import LocalNorm


class PairGPTModel(GPTModel):
    """GPTModel whose rotary embedding follows the plan's positions instead of the place in the pack."""

    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        outputs = list(super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs))
        if isinstance(packed_seq_params, AttentionPlan) and outputs[1] is not None:
            outputs[1] = outputs[1][packed_seq_params.positions]
        return tuple(outputs)


class PairGPTBuilder(GPTModelBuilder):
    """Builds :class:`PairGPTModel` stages."""

    def build_model(self, *args: Any, **kwargs: Any) -> PairGPTModel:
        """Build one pipeline stage; arguments as ``GPTModelBuilder.build_model``."""
        model = super().build_model(*args, **kwargs)
        # GPTModelBuilder names GPTModel. The subclass adds one method and no state, so re-classing the instance
        # says the same as copying the builder's fifty lines, and stays right when those change.
        model.__class__ = PairGPTModel
        return model


@dataclass(kw_only=True)
class PairGPTConfig(GPTModelConfig):
    """GPTModelConfig that names our builder and layer spec."""

    builder: ClassVar[str] = f"{__name__}.{PairGPTBuilder.__qualname__}"

    def __post_init__(self) -> None:
        self.transformer_layer_spec = pair_block_spec


def pair_block_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Megatron's own decoder block with pair attention, and sequence-parallel norms in local layers."""
    transformer = config.transformer
    use_te = transformer.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        transformer,
        use_te,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    block.layer_specs = [copy.deepcopy(spec) for spec in block.layer_specs]  # Megatron shares one object among layers
    for spec in block.layer_specs:
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = PairAttention
        if not use_te:
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LocalNorm
            if transformer.qk_layernorm and not transformer.qk_l2_norm:
                attention.q_layernorm = attention.k_layernorm = LocalNorm
    if not use_te:
        block.layer_norm = LocalNorm
    return block


def score_sequences(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Any, config: Any, **unused: Any
) -> Tensor:
    """``output_processor`` of GPTModel: hidden states of a pack -> log pi(y|x) of its sequences.

    Args:
        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        context: (ScoredPositions, TokenScoring).

    Returns:
        [S] float64, in nats; with the entropy [2, S], its sums over each sequence in the second row.
    """
    scored, scoring = context
    assert isinstance(scored, ScoredPositions) and isinstance(scoring, TokenScoring)
    tokens = scoring(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        output_layer.bias,
        scored,
        tp_group=output_layer.tp_group,
        sequence_parallel=config.sequence_parallel,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
    )
    sums = sequence_log_probs(tokens.log_probs, scored)
    if tokens.entropy is not None:
        sums = torch.stack([sums, sequence_log_probs(tokens.entropy, scored)])
    return sums
