"""What a reference is, as names and JSON values: two references of one identity give a pair the same log-probs.

All of the model's configuration counts but what is listed here, so a field that a later Megatron adds counts, too: at
worst log-probs are scored again that were good. What is left out makes rounding differ and no more.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.model.layer_options import LayerOptions
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.training.reference.cache import IDENTITY_VERSION

#: Raised when a name comes to mean something else. Version 1 had 46 of Megatron's arguments, and no entry for this.
VERSION = 2

#: Fields of the configuration that do not change what given weights compute, by the reason why.
LEFT_OUT: dict[str, str] = {
    "over how many ranks the model is split, and where": """
        tensor_model_parallel_size tensor_parallel_num_weight_shards gtp_weight_remat_size pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size hierarchical_context_parallel_sizes
        hybrid_context_parallel max_seqlen_per_dp_cp_rank cp_comm_type expert_model_parallel_size
        expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split mtp_standalone
        microbatch_group_size_per_vp_stage parallel_output scatter_embedding_sequence_parallel""",
    "how ranks send each other what they have": """
        pipeline_model_parallel_comm_backend pipeline_dtype variable_seq_lengths overlap_p2p_comm batch_p2p_comm
        batch_p2p_sync use_ring_exchange_p2p overlap_p2p_comm_warmup_flush tp_comm_overlap tp_comm_bulk_wgrad
        tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
        tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
        tp_comm_bootstrap_backend tp_comm_overlap_cfg symmetric_ar_type overlap_moe_expert_parallel_comm
        high_priority_a2a_comm_stream moe_shared_expert_overlap moe_token_dispatcher_type moe_enable_deepep
        moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape
        moe_ncclep_zero_copy""",
    "what is kept for the backward pass, where, and what is computed twice": """
        recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations
        moe_layer_recompute num_microbatches_with_partial_activation_checkpoints deallocate_pipeline_outputs
        ep_overlap_early_attn_memory_release clone_scatter_output_in_embedding disable_parameter_transpose_cache
        mlp_chunks_for_training cpu_offloading cpu_offloading_num_layers _cpu_offloading_context
        cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
        cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads moe_paged_stash
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu""",
    "gradients, and how the weights learn: a reference has neither": """
        freeze_routers
        finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func
        param_sync_func gradient_accumulation_fusion delay_wgrad_compute defer_embedding_wgrad_compute
        wgrad_deferral_limit overlap_dispatch_backward_with_experts_wgrad fp8_wgrad calculate_per_token_loss
        cross_entropy_loss_fusion cross_entropy_fusion_impl mtp_loss_scaling_factor moe_aux_loss_coeff moe_z_loss_coeff
        moe_router_bias_update_rate moe_router_quantile_balancing_ema dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
        experimental_attention_variant_loss_scale_func qk_clip qk_clip_alpha qk_clip_threshold""",
    "dropout, which evaluation leaves out": "hidden_dropout attention_dropout use_te_rng_tracker",
    "where weights come from: they have a digest": """
        perform_initialization use_cpu_initialization init_model_with_meta_device init_method output_layer_init_method
        init_method_std embedding_init_method embedding_init_method_std pre_wrap_hooks post_wrap_hooks
        extra_checkpoint_metadata""",
    "rows of the vocabulary that are padding, and of positions: the digest has the true ones": """
        vocab_size should_pad_vocab make_vocab_size_divisible_by seq_length""",
    "which kernel computes a function": """
        separate_norms pair_attention attention_backend flash_attention_version fuse_local_layers bias_activation_fusion
        masked_softmax_fusion bias_dropout_fusion apply_rope_fusion use_fused_weighted_squared_relu
        fused_single_qkv_rope fused_residual_rmsnorm persist_layer_norm memory_efficient_layer_norm
        use_te_activation_func use_transformer_engine_op_fuser
        moe_grouped_gemm moe_permute_fusion moe_router_fusion deterministic_mode""",
    "CUDA graphs, which repeat the same kernels": """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_modules cuda_graph_scope
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps""",
    "generating text, which a reference does not": """
        flash_decode inference_rng_tracker inference_sampling_seed use_inference_optimized_layers
        inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type inference_cuda_graph_scope
        nccl_all_reduce_for_prefill mlp_chunks_for_prefill moe_pad_experts_for_cuda_graph_inference""",
    "said by another field: it is the activation_func, the softmax_scale": "geglu_tanh attention_scale",
    "clocks and logs": """
        timers barrier_with_L1_time config_logger_dir log_max_attention_logit moe_per_layer_logging""",
}  # fmt: skip
_NOT_COUNTED = frozenset(" ".join(LEFT_OUT.values()).split())
_PARTS = frozenset({"transformer", "layers"})


def reference_identity(config: PairGPTConfig, weights: str, scoring: TokenScoring) -> dict[str, Any]:
    """Everything that changes reference log-probs besides the pairs, by name; the same on all ranks, in every layout.

    Args:
        weights: ``model.digest.weights_digest`` of the reference.
        scoring: how log-probs are computed, and over which vocabulary.

    Raises:
        TypeError: a field holds something whose value cannot be told.
    """
    computed = {"weights": weights, "vocabulary": scoring.vocab_size, "log_probs": scoring.kernel}
    parts = [_counting(config), _counting(config.transformer), _layer_options(config.layers)]
    assert len({*computed}.union(*parts)) == len(computed) + sum(map(len, parts)), "names hide others"
    counted = {name: _json(value, name) for part in parts for name, value in part.items()}
    return {IDENTITY_VERSION: VERSION, **computed, **counted}


def is_of_this_version(identity: Mapping[str, Any]) -> bool:
    """Whether its names are those of :func:`reference_identity`."""
    return identity.get(IDENTITY_VERSION) == VERSION


def of_every_version(identity: Mapping[str, Any]) -> dict[str, Any]:
    """That part of an identity which has the same names in all versions."""
    return {name: identity.get(name) for name in ("weights", "vocabulary", "log_probs")}


def _counting(config: Any) -> dict[str, Any]:
    """Fields, and what else is set on a configuration: Megatron hangs YaRN's settings on it without declaring them."""
    return {name: value for name, value in vars(config).items() if name not in _NOT_COUNTED | _PARTS}


def _layer_options(options: LayerOptions) -> dict[str, Any]:
    """Those that are on: a cache stays good when this package learns of one more."""
    on = {each.name: getattr(options, each.name) for each in fields(options)}
    is_off = {each.name for each in fields(options) if on[each.name] == each.default}
    older = {"scale_embeddings"}  # than this rule
    return {name: value for name, value in on.items() if name not in _NOT_COUNTED | (is_off - older)}


def _json(value: Any, name: str) -> Any:
    """A value of the field ``name`` in JSON: equal for equal values, in all processes."""
    match value:
        case enum.Enum():  # first: some are strings or numbers as well
            return value.value if isinstance(value, str) else value.name
        case None | bool() | int() | float() | str():
            return value
        case torch.dtype():
            return str(value)
        case list() | tuple():
            return [_json(each, name) for each in value]
        case dict():
            return {str(key): _json(each, name) for key, each in value.items()}
        case functools.partial():
            return {"partial": _json([value.func, value.args, value.keywords], name)}
    if inspect.isroutine(value) or inspect.isclass(value):
        return _function(value, name)
    if hasattr(value, "__dict__") and _holds_attributes_only(type(value)):
        return {"class": _qualified(type(value)), **{key: _json(each, name) for key, each in vars(value).items()}}
    raise TypeError(f"the model's configuration: {name} is {value!r}, which nothing can be compared with")


def _holds_attributes_only(kind: type) -> bool:
    """As classes of Python do; others (tensors) hold more, and make themselves in their own way."""
    return all("__new__" not in vars(each) for each in kind.__mro__ if each is not object)


def _function(value: Any, name: str) -> Any:
    """A function or class by its name, with what it remembers; one without a name cannot be told from others."""
    if "<lambda>" in value.__qualname__:
        raise TypeError(f"the model's configuration: {name} is a function without a name. Give it one with def.")
    remembered = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    if inspect.ismethod(value):
        remembered.append(value.__self__)
    return {_qualified(value): _json(remembered, name)} if remembered else _qualified(value)


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
