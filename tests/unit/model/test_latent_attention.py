"""Multi-latent attention: what is built of Transformer Engine's spec, which does not run here, and of norms."""

from __future__ import annotations

from typing import Any


def te_layer() -> dict[str, Any]:
    """On a rank: Transformer Engine's attention, stand-ins for its classes alone, as ``pair_block_spec`` leaves it."""
    from types import SimpleNamespace
    from unittest import mock

    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_bdpo.model import pair_gpt
    from megatron_bdpo.model.latent_attention import PairLatentAttention

    fused, plain, norm = (type(name, (), {}) for name in ("Fused", "Plain", "Norm"))
    backend = SimpleNamespace(column_parallel_linear=lambda: plain, layer_norm=lambda: norm)
    spec = ModuleSpec(
        gpt_layer_specs.MLASelfAttention,
        submodules=MLASelfAttentionSubmodules(
            linear_proj=plain,
            linear_q_proj=plain,
            linear_q_up_proj=fused,
            linear_kv_up_proj=fused,
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )
    transformer = SimpleNamespace(transformer_impl="transformer_engine", qk_layernorm=True)
    config = SimpleNamespace(transformer=transformer, layers=SimpleNamespace(latent_norm_epsilon=None))
    # Megatron's provider cannot be imported without Transformer Engine's classes.
    with mock.patch.object(provider, "TESpecProvider", lambda: backend):
        pair_gpt._latent_attention(spec, config)
    attention = spec.submodules
    return {
        "module": spec.module is PairLatentAttention,
        "projections from latents": attention.linear_q_up_proj is attention.linear_kv_up_proj is plain,
        "queries without a latent": attention.linear_q_proj is plain,
        "norms": attention.q_layernorm is attention.kv_layernorm is norm,
    }


def test_transformer_engines_layers_have_the_norms_of_latents_apart(ranks):
    """So that checkpoints name them as local layers do, and their epsilon may be their own."""
    (found,) = ranks(1)(te_layer)
    assert all(found.values()), found


def epsilons() -> list[float]:
    """On a rank: of the latents' norms and of a layer's."""
    from types import SimpleNamespace

    from megatron_bdpo.model.latent_attention import norm_with_epsilon
    from megatron_bdpo.model.norm import LocalNorm

    config = SimpleNamespace(normalization="RMSNorm", layernorm_zero_centered_gamma=False, sequence_parallel=True)
    builders = (norm_with_epsilon(LocalNorm, 1e-6), norm_with_epsilon(LocalNorm, None))
    built = [builder(config=config, hidden_size=4, eps=1e-3) for builder in builders]
    assert all(norm.weight.sequence_parallel for norm in built)
    return [norm.eps for norm in built]


def test_an_epsilon_of_their_own(ranks):
    assert ranks(1)(epsilons)[0] == [1e-6, 1e-3]
