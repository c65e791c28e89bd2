"""Megatron's GPT model, made to read packed groups: config, builder, and the one override it needs.

This is the only file that names GPTModel (Megatron announces its replacement by HybridModel).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.training.models import GPTModelConfig
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_bdpo.logprobs import AnswerScores, ScoredPositions, TokenScoring, answer_log_probs, likeliest_tokens
from megatron_bdpo.model.attention import AttentionPlan, PairAttention
from megatron_bdpo.model.latent_attention import norm_with_epsilon, with_latent_attention
from megatron_bdpo.model.layer import with_options
from megatron_bdpo.model.layer_options import LayerOptions
from megatron_bdpo.model.linear_biases import add_biases
from megatron_bdpo.model.moe import freeze_routers, let_expert_biases_be_added, tell_pairs, with_pair_router
from megatron_bdpo.model.norm import (
    LayerNormWithoutBias,
    LocalNorm,
    ZeroCenteredRMSNorm,
    norm_builder,
    separate_norms,
    te_layers,
)
from megatron_bdpo.model.precision import forget_quantisation_state
from megatron_bdpo.model.reward_head import RewardHead, name_head
from megatron_bdpo.model.shards import WHOLE, is_adapter


class PairGPTModel(GPTModel):
    """GPTModel whose rotary embedding follows the plan's positions, and whose experts know the plan's padding."""

    embedding_scale: float | None
    local_rotary: RotaryEmbedding | None
    """Of layers with a window, where they have another than the others."""
    keeps_adapters_only: bool = False
    """Checkpoints hold its adapters and not the weights that they stand beside. See ``model.lora``."""

    def sharded_state_dict(self, *args: Any, metadata: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint holds of it; all weights where the metadata ask for them (``shards.WHOLE``)."""
        state: dict[str, Any] = super().sharded_state_dict(*args, metadata=metadata, **kwargs)
        if self.post_process and isinstance(self.output_layer, RewardHead):
            name_head(state)
        if not self.keeps_adapters_only or (metadata or {}).get(WHOLE):
            return state
        return {key: value for key, value in state.items() if is_adapter(key)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """Load what a checkpoint holds."""
        if not self.keeps_adapters_only:
            return super().load_state_dict(state_dict, strict=strict, **kwargs)
        expected = {name for name in self.state_dict() if is_adapter(name)}
        if strict and expected != state_dict.keys():
            raise KeyError(f"the adapters of the checkpoint are others: {sorted(expected ^ state_dict.keys())[:8]}")
        return super().load_state_dict(state_dict, strict=False, **kwargs)

    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        plan = packed_seq_params
        assert isinstance(plan, AttentionPlan)
        # For 'thd' sequences Megatron makes the rotary table of all positions; for others it cuts out the places that
        # its own context parallelism gives to this rank.
        for_whole_table = copy.copy(plan)
        for_whole_table.qkv_format = "thd"
        outputs = list(super()._preprocess(*args, packed_seq_params=for_whole_table, **kwargs))
        if self.embedding_scale is not None and outputs[0] is not None:
            outputs[0] = outputs[0] * self.embedding_scale
        if outputs[1] is not None:
            table = outputs[1]
            outputs[1] = table[plan.positions]
            if self.local_rotary is not None:  # each layer takes its own of the two: see ``layer.PairLayer``
                local = self.local_rotary(len(table), packed_seq=True)
                outputs[1] = torch.stack([outputs[1], local[plan.positions]])
        if self.config.num_moe_experts:
            outputs[5] = self.own_positions(plan.padding)[None]
        return tuple(outputs)

    def own_positions(self, per_position: Tensor) -> Tensor:
        """Of one value per position, those of this tensor-parallel rank; under SP each has a part of the sequence."""
        if not self.config.sequence_parallel:
            return per_position
        group = self.pg_collection.tp
        return per_position.chunk(group.size())[group.rank()]


class PairGPTBuilder(GPTModelBuilder):
    """Builds :class:`PairGPTModel` stages."""

    def build_model(self, *args: Any, **kwargs: Any) -> PairGPTModel:
        """Build one pipeline stage; arguments as ``GPTModelBuilder.build_model``."""
        model = super().build_model(*args, **kwargs)
        # GPTModelBuilder names GPTModel, which names its output layer. The subclasses add methods and no weights, so
        # re-classing the instances says the same as copying their builders' code, and stays right when that changes.
        model.__class__ = PairGPTModel
        model.embedding_scale = self._embedding_scale()
        model.local_rotary = self._local_rotary()
        if self._model_config.layers.rotary_factors:
            self._divide_frequencies(model)
        forget_quantisation_state(model)
        let_expert_biases_be_added(model)
        tell_pairs(model)
        if self._model_config.freeze_routers:
            freeze_routers(model)
        for module in model.modules():
            if isinstance(module, PairAttention):
                module.backend = self._model_config.pair_attention
                module.softcap = self._model_config.layers.attention_softcap
            if isinstance(module, ZeroCenteredRMSNorm) and self._model_config.fuse_local_layers:
                module.compile(dynamic=True)
        if model.post_process and self._model_config.rewards:
            model.output_layer = RewardHead(model.config, model.tp_group)
        elif model.post_process:
            model.output_layer.__class__ = ScoringOutputLayer
        return model

    def _embedding_scale(self) -> float | None:
        """Gemma's is rounded to the embeddings' type, as models are trained with it."""
        options, transformer = self._model_config.layers, self._model_config.transformer
        if not options.scale_embeddings:
            return options.embedding_multiplier
        return torch.tensor(transformer.hidden_size**0.5, dtype=transformer.params_dtype).item()

    def _divide_frequencies(self, model: PairGPTModel) -> None:
        """LongRoPE, for sequences of up to the length before the extension (2402.13753)."""
        options, frequencies = self._model_config.layers, model.rotary_pos_emb.inv_freq
        factors = torch.tensor(options.rotary_factors, dtype=frequencies.dtype, device=frequencies.device)
        model.rotary_pos_emb.inv_freq = frequencies / factors
        for module in model.modules():
            if isinstance(module, SelfAttention):  # where Megatron has the same of YaRN
                module._yarn_concentration_factor = options.rotary_attention_factor or 1.0

    def _local_rotary(self) -> RotaryEmbedding | None:
        config = self._model_config
        if config.layers.local_rotary_base is None:
            return None
        return RotaryEmbedding(
            config.transformer.kv_channels,
            config.rotary_percent,
            config.transformer.rotary_interleaved,
            rotary_base=config.layers.local_rotary_base,
            use_cpu_initialization=config.transformer.use_cpu_initialization,
        )


@dataclass(kw_only=True)
class PairGPTConfig(GPTModelConfig):
    """GPTModelConfig that names our builder and layer spec."""

    layers: LayerOptions = field(default_factory=LayerOptions)
    """What Megatron's configuration does not say."""

    pair_attention: str | None = None
    """A name of ``attention_backends.BACKENDS``; None for the default of device and precision."""

    fuse_local_layers: bool = False
    """Compile the norms of local layers that are not one kernel of torch's."""

    separate_norms: bool = False
    """Norms in front of Transformer Engine's linear layers as layers of their own: adapters read what they give."""

    freeze_routers: bool = False
    """Routers of experts have no gradients."""

    rewards: bool = False
    """A scalar head stands in the output layer's place; see ``reward_head``."""

    builder: ClassVar[str] = f"{__name__}.{PairGPTBuilder.__qualname__}"

    def __post_init__(self) -> None:
        self.transformer_layer_spec = pair_block_spec


def pair_block_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Megatron's own decoder block with pair attention and router, and sequence-parallel norms in local layers."""
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
        spec.submodules.mlp = with_pair_router(spec.submodules.mlp)
        if transformer.multi_latent_attention:
            _latent_attention(spec.submodules.self_attention, config)
        if not use_te:
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LocalNorm
            if transformer.qk_layernorm and not transformer.qk_l2_norm and not transformer.multi_latent_attention:
                attention.q_layernorm = attention.k_layernorm = LocalNorm
        with_options(spec, config.layers, use_te=use_te)
    if not use_te:
        block.layer_norm = LocalNorm
    elif config.separate_norms:
        for spec in block.layer_specs:
            separate_norms(spec.submodules)
    if config.layers.norms_without_bias:
        block.layer_norm = LayerNormWithoutBias
    for spec in block.layer_specs:
        add_biases(spec.submodules, config.layers)
    return block


def _latent_attention(spec: Any, config: Any) -> None:
    """Multi-latent attention along a plan, its norms apart, in either implementation."""
    transformer = config.transformer
    use_te = transformer.transformer_impl == "transformer_engine"
    # In local layers the projection of queries is behind no norm.
    linear = te_layers().column_parallel_linear() if use_te else spec.submodules.linear_q_proj
    norm = norm_with_epsilon(norm_builder(use_te=use_te), config.layers.latent_norm_epsilon)
    with_latent_attention(spec, norm if transformer.qk_layernorm else None, linear)


class ScoringOutputLayer(ColumnParallelLinear):
    """The output layer, called for log-probs of scored positions instead of the logits of all.

    It has to be called and not only read: with ``--overlap-param-gather`` that is when DDP waits for the weight.
    """

    def forward(self, hidden_states: Tensor, weight: Tensor | None, context: ScoringContext) -> Tensor:
        """Hidden states of a pack -> log pi(y|x) of its answers.

        Args:
            hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
            weight: [V/tp, H] of the tied embedding; None for the layer's own.

        Returns:
            [A] float64, in nats; with entropies [rows, A] (see ``AnswerScores.stacked``).
        """
        tokens = context.scoring(
            hidden_states,
            self.weight if weight is None else weight,
            self.bias,
            context.scored,
            tp_group=self.tp_group,
            sequence_parallel=self.config.sequence_parallel,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
        )

        def over_answers(each: Tensor) -> Tensor:
            return answer_log_probs(each, context.scored, context.context_group)

        entropies = (None if each is None else over_answers(each) for each in tokens[1:])
        return AnswerScores(over_answers(tokens.log_probs), *entropies).stacked()


@dataclass(frozen=True)
class ScoringContext:
    """What the output layer is to score, and how."""

    scored: ScoredPositions
    scoring: TokenScoring
    context_group: Any
    """Process group over which the answers' positions are split."""


def score_answers(
    *,
    hidden_states: Tensor,
    output_layer: ScoringOutputLayer,
    output_weight: Tensor | None,
    context: ScoringContext,
    **unused: Any,
) -> Tensor:
    """``output_processor`` of GPTModel: see :meth:`ScoringOutputLayer.forward`."""
    scores: Tensor = output_layer(hidden_states, output_weight, context)
    return scores


@dataclass(frozen=True)
class NextTokenContext:
    """Which positions of a pack are to be continued."""

    positions: ScoredPositions
    vocab_size: int
    """Entries of the tokenizer."""


def next_tokens(
    *,
    hidden_states: Tensor,
    output_layer: ScoringOutputLayer,
    output_weight: Tensor | None,
    context: NextTokenContext,
    **unused: Any,
) -> Tensor:
    """``output_processor`` of GPTModel: the likeliest token after each position, [N] int64, the same on all TP ranks.

    The output layer's weight is read, so it must not be gathered just now (see ``evaluation.weights_at_rest``).
    """
    return likeliest_tokens(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        output_layer.bias,
        context.positions,
        vocab_size=context.vocab_size,
        tp_group=output_layer.tp_group,
        sequence_parallel=output_layer.config.sequence_parallel,
    )
