"""Megatron's transformer layer with what families of models add to it: see ``LayerOptions``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_bdpo.model.attention import window_of
from megatron_bdpo.model.layer_options import LayerOptions
from megatron_bdpo.model.norm import LayerNormWithoutBias, ProjectionNorm, norm_builder, separate_norms

#: What Megatron's bias-dropout-add gives: it adds (output, bias) to a residual.
Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class PairLayer(TransformerLayer):
    """A layer whose attention and MLP give something else to the residual than what they return, or read the same
    norm; or that chooses between two rotary tables.

    Its norms behind are marked as Megatron's own are, so their gradients are complete under sequence parallelism.
    """

    def __init__(
        self, config: Any, submodules: Any, *args: Any, options: LayerOptions, norm: Any, **kwargs: Any
    ) -> None:
        """``options`` say what is on; ``norm`` builds a norm of hidden states. The others are Megatron's."""
        super().__init__(config, submodules, *args, **kwargs)
        self.post_self_attn_layernorm = self.post_mlp_layernorm = None
        if options.layer_norms != "before":
            sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
            self.post_self_attn_layernorm, self.post_mlp_layernorm = norm(**sizes), norm(**sizes)
        for add, behind in (("self_attn_bda", self.post_self_attn_layernorm), ("mlp_bda", self.post_mlp_layernorm)):
            setattr(self, add, _Behind(getattr(self, add), behind, options.residual_multiplier))
        self.has_two_tables = options.local_rotary_base is not None
        self.is_local = window_of(config, self.layer_number) is not None
        if self.has_two_tables and self.is_local:
            # YaRN's factor of queries and keys is for its own table.
            self.self_attention._yarn_concentration_factor = 1.0
        self._read_by_both: Tensor | None = None
        self.is_parallel = options.parallel_layers
        if self.is_parallel:
            self.input_layernorm.register_forward_hook(self._keep_for_mlp)

    def _keep_for_mlp(self, norm: Any, inputs: Any, output: Tensor) -> None:
        self._read_by_both = output

    def _forward_attention(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        if self.has_two_tables and rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb[int(self.is_local)]
        return super()._forward_attention(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Any:
        """What the MLP reads; Megatron takes it with what its output is added to."""
        if not self.is_parallel:
            return super()._forward_pre_mlp_layernorm(hidden_states)
        normed, self._read_by_both = self._read_by_both, None
        return normed, hidden_states


class _Behind:
    """In the place of Megatron's ``get_bias_dropout_add``: what comes between an output and the residual."""

    def __init__(self, get_add: Callable[[bool, bool], Add], norm: Any, multiplier: float | None) -> None:
        self._get_add, self._norm, self._multiplier = get_add, norm, multiplier

    def __call__(self, training: bool, fused: bool) -> Add:
        return functools.partial(self._add, self._get_add(training, fused))

    def _add(
        self, add: Add, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        if self._norm is not None:
            output = self._norm(output)
        if self._multiplier is not None:
            output = output * self._multiplier
        return add((output, None), residual, dropout)


def with_options(spec: Any, options: LayerOptions, *, use_te: bool) -> None:
    """Give a layer what is on.

    Args:
        spec: of Megatron's layer, changed in place.
        use_te: it is one of Transformer Engine's.
    """
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if options.qk_norm_over_heads:
        attention.q_layernorm = functools.partial(ProjectionNorm, heads="num_attention_heads")
        attention.k_layernorm = functools.partial(ProjectionNorm, heads="num_query_groups")
    if use_te and (options.layer_norms == "after" or options.parallel_layers or options.norms_without_bias):
        separate_norms(layer)
    if options.norms_without_bias:
        layer.input_layernorm = layer.pre_mlp_layernorm = LayerNormWithoutBias
    if options.layer_norms == "after":
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    if options.parallel_layers:
        layer.pre_mlp_layernorm = IdentityOp
    own = (options.layer_norms != "before", options.residual_multiplier, options.local_rotary_base)
    if any((*own, options.parallel_layers)):
        assert spec.module is TransformerLayer
        spec.module, spec.params = PairLayer, {**spec.params, "options": options, "norm": norm_builder(use_te=use_te)}
