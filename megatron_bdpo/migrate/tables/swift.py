"""ms-swift: ``swift rlhf`` on transformers, and ``megatron rlhf`` on Megatron, each with ``--rlhf_type``."""

from __future__ import annotations

from dataclasses import replace

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Entry,
    Gate,
    Loss,
    LossOption,
    Refused,
    Source,
    Switch,
    To,
    Unneeded,
    Weights,
    refused,
    same,
    switches,
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "adapters")
_MEGATRONS_LORA = tuple(name for name in _LORA if name not in ("adapters", "use_dora"))
_SAMPLED = {"#": "Give --max-pairs N in the place of NAME#N, or NAME:train[:N]."}
_SHIFTED = (
    "There it shifts rewards by their running mean, which is another loss. Take it out, or say it in the recipe: "
    "preference-loss: dpo=0.8,bco_pair=0.2,sft=1."
)
_TUNER = Choice({"lora": "--lora-rank says it", "full": "all weights are trained"}, "Take lora or full.")

#: What both programs have.
_BOTH: dict[str, Entry] = {
    "rlhf_type": Choice(
        {
            "dpo": "the loss is --preference-loss",
            "orpo": {"preference-loss": "orpo"},
            "cpo": "the loss is --preference-loss",
            "simpo": "the loss is --preference-loss",
            "kto": "the loss is --preference-loss",
            "rm": {"objective": "reward"},
        },
        "This program trains on pairs and on labelled answers that are there: dpo, cpo, simpo, orpo, kto or rm.",
    ),
    "model": To("hf-model"),
    "model_revision": To("hf-revision"),
    "ref_model": To("reference-model"),
    "loss_type": Loss(
        {"sigmoid": "dpo", "bco_pair": Refused(_SHIFTED)},
        weights="loss_weights",
        by_key={"rlhf_type": dict.fromkeys(("cpo", "simpo"), shared.LOSSES_OF_CPO)},
        notes={"sft": f"sft is {shared.OF_THE_BATCH}"},
    ),
    "loss_weights": Weights(),
    "center_rewards_coefficient": To("center-rewards-coefficient", "number", off=("0", "0.0")),
    "discopop_tau": LossOption("discopop_tau", off=("0.05",)),
    "beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "rpo_alpha": LossOption("nll_weight", off=("0", "0.0"), note=shared.OF_THE_BATCH),
    "cpo_alpha": LossOption("nll_weight", note=shared.OF_THE_BATCH),
    "simpo_gamma": LossOption("simpo_gamma"),
    "label_smoothing": LossOption("label_smoothing", off=("0", "0.0")),
    "f_divergence_type": Choice(
        {"reverse_kl": "DPO's own", "js_divergence": {"f-divergence": "js_divergence"}},
        "Another one is left out there, or has a coefficient of its own: take it out, or say --f-divergence.",
    ),
    "reference_free": shared.MODIFIERS["reference_free"],
    **shared.WEIGHTS_OF_LABELS,
    "calculate_KL": Choice(
        {"true": "kto does"}, "Without it KTO is apo_zero_unpaired: take it out, and say loss_type apo_zero_unpaired."
    ),
    "dataset": To("pair-data", "list", without=_SAMPLED),
    "val_dataset": To("eval-pair-data", "list", without=_SAMPLED),
    "split_dataset_ratio": To("eval-share", "number", off=("0", "0.0")),
    "columns": Refused("Say it: --pair-columns OURS=THEIRS,..."),
    "max_length": To("seq-length", "whole", times=shared.TWICE),
    "train_type": _TUNER,
    "tuner_type": _TUNER,
    "lora_rank": To("lora-rank", "whole"),
    "lora_alpha": To("lora-alpha", "number"),
    "lora_dropout": To("lora-dropout", "number"),
    "target_modules": shared.LORA_TARGETS,
    "use_rslora": shared.PEFT["use_rslora"],
    "adapters": To("lora-start"),
    "torch_dtype": Choice(
        {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": "fp32 is the default"},
        "Take bfloat16, float16 or float32.",
    ),
    "output_dir": To("save", beside={"save-hf": "{}/hf"}),
    "save_steps": To("save-interval", "whole"),
    "save_strategy": shared.TRAINING["save_strategy"],
    "save_total_limit": To("keep-checkpoints", "whole"),
    "eval_steps": To("eval-interval", "whole"),
    "logging_steps": To("log-interval", "whole"),
    "seed": To("seed", "whole"),
    "bf16": Switch("bf16"),
    "fp16": Switch("fp16"),
    "template": Unneeded(shared.TEMPLATE),
    "system": Refused("Put it into the rows: a message of the role system."),
    "merge_lora": Refused("Say it in the recipe: save-hf-merged: DIR."),
    "resume_from_checkpoint": shared.TRAINING["resume_from_checkpoint"],
    "truncation_strategy": Choice({"delete": {"long-pairs": "drop"}}, "Say --long-pairs, or --max-response-length."),
    **unneeded("names are those of the Hugging Face hub", "use_hf model_type hub_token"),
    **unneeded("rows are tokenized once and kept", "load_from_cache_file dataset_num_proc lazy_tokenize streaming"),
    **unneeded(
        shared.LOADING,
        "dataloader_num_workers dataloader_pin_memory dataset_shuffle train_dataloader_shuffle "
        "dataloader_persistent_workers dataloader_prefetch_factor group_by_length data_sharding",
    ),
    **unneeded(
        shared.LOGGING, "report_to tensorboard_dir wandb_project wandb_exp_name swanlab_project swanlab_exp_name"
    ),
    **unneeded(shared.PACKED, "padding_free packing_length"),
    **unneeded("one program has it", "use_ray device_groups.* ddp_timeout ddp_backend check_model"),
    **refused("Take it out.", "sync_ref_model modules_to_save target_regex lora_bias loss_scale ref_adapters"),
    "ld_alpha": Refused(shared.LD_ALPHA, ("none", "null", "1", "1.0")),
    **unneeded(
        "counts with another rlhf_type only",
        "temperature max_completion_length max_new_tokens sft_alpha lmbda seq_kd "
        "gkd_logits_topk teacher_model teacher_adapters teacher_model_type teacher_model_revision teacher_deepspeed "
        "teacher_model_server offload_teacher_model reward_model reward_adapters reward_model_type "
        "reward_model_revision reward_template num_ppo_epochs whiten_rewards kl_coef cliprange vf_coef "
        "cliprange_value gamma lam num_mini_batches local_rollout_forward_batch_size num_sample_generations "
        "response_length missing_eos_penalty num_generations reward_funcs reward_weights log_completions "
        "num_iterations _teacher_use_disable_adapter teacher_tag_key teacher_kl_coef",
    ),
    **unneeded(
        "another tuner_type's",
        "lora_ga_batch_size lora_ga_iters lora_ga_max_length lora_ga_direction lora_ga_scale lora_ga_stable_gamma "
        "fourier_n_frequency fourier_scaling boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout "
        "vera_rank vera_projection_prng_key vera_dropout vera_d_initial adapter_act adapter_length adalora_target_r "
        "adalora_init_r adalora_tinit adalora_tfinal adalora_deltaT adalora_beta1 adalora_beta2 "
        "adalora_orth_reg_weight llamapro_num_new_blocks llamapro_num_groups reft_layer_key reft_layers reft_rank "
        "reft_intervention_type reft_args",
    ),
    **unneeded("the model's files say it", "model_name model_author experts_impl task_type num_labels problem_type"),
    **unneeded(
        "rows are read and tokenized once",
        "cached_dataset cached_val_dataset packing_num_proc "
        "packing_strategy download_mode val_dataset_shuffle shuffle_buffer_size interleave_prob "
        "stopping_strategy custom_dataset_info strict",
    ),
    **unneeded(shared.SHARDING, "device_map max_memory zero_hpz_partition_size deepspeed_autotp_size"),
    **unneeded(
        shared.LOGGING,
        "swanlab_token swanlab_workspace swanlab_notification_method swanlab_webhook_url swanlab_secret "
        "swanlab_sender_email swanlab_receiver_email swanlab_smtp_server swanlab_smtp_port swanlab_email_language "
        "swanlab_mode",
    ),
    **unneeded("--save names the directory", "add_version create_checkpoint_symlink"),
    **unneeded(
        shared.NOT_QUANTIZED,
        "hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage",
    ),
    "quant_method": shared.NO_QUANTIZATION,
    "sequence_parallel_size": To("context-parallel-size", "whole", off=("1",)),
    "use_chat_template": Choice({"true": "messages go through the tokenizer's template"}, "Take messages."),
    **unneeded(shared.TEMPLATE, "template_backend padding_side norm_bbox max_pixels"),
    **refused(
        "Say it in the recipe: chat-template-kwargs.", "enable_thinking preserve_thinking add_non_thinking_prefix"
    ),
    **refused("Put it into the rows, or into the tokenizer's template.", "agent_template response_prefix"),
    "tuner_backend": Refused("Adapters are as PEFT's: peft.", ("peft",)),
    "init_weights": Refused("Adapters begin as PEFT's do: true.", ("true",)),
    "lora_dtype": Unneeded("adapters are trained in fp32"),
    **unneeded("a recipe holds all that a run is", "load_args load_data_args ignore_args_error"),
    **refused(
        "Take it out.",
        "external_plugins custom_register_path model_kwargs enable_npu_model_patch use_swift_lora "
        "disable_auto_column_mapping new_special_tokens rope_scaling max_model_len local_repo_path init_strategy "
        "is_binary_loss_scale disable_ignore_empty_think ref_model_type ref_model_revision freeze_parameters "
        "freeze_parameters_regex freeze_parameters_ratio trainable_parameters trainable_parameters_regex freeze_llm "
        "freeze_vit freeze_aligner target_parameters lorap_lr_ratio",
    ),
    "packing": Refused("With it a batch counts packs, not pairs: take it out; pairs are packed here in any case."),
}

_RLHF_DEFAULTS = {
    "rlhf_type": Default("dpo"),
    "loss_type": Default("sigmoid", by_key="rlhf_type", by_value={"kto": "kto", "simpo": "simpo"}),
    "beta": Default("0.1", by_key="rlhf_type", by_value={"simpo": "2.0"}),
    "cpo_alpha": Default("1.0"),
    "simpo_gamma": Default("1.0"),
    "lora_rank": Default("8"),
    "lora_alpha": Default("32"),
    "lora_dropout": Default("0.05"),
    "seed": Default("42"),
    "save_steps": Default("500"),
}
_OF_LOSSES_OF_PAIRS = ("rpo_alpha", "cpo_alpha", "simpo_gamma", "label_smoothing", "discopop_tau")
_OF_DPO = ("f_divergence_type", "reference_free")
_RLHF_GATES = (
    Gate("rlhf_type", ("dpo", "kto", "cpo", "simpo"), ("loss_type", "loss_weights"), default="dpo"),
    Gate("rlhf_type", ("dpo",), _OF_DPO, default="dpo"),
    Gate("rlhf_type", ("dpo", "cpo", "simpo", "orpo"), _OF_LOSSES_OF_PAIRS, default="dpo"),
    Gate("rlhf_type", ("dpo", "cpo", "simpo", "orpo", "kto"), ("beta",), default="dpo"),
    Gate("rlhf_type", ("kto",), ("desirable_weight", "undesirable_weight", "calculate_KL"), default="dpo"),
    Gate("rlhf_type", ("cpo", "simpo"), ("cpo_alpha", "simpo_gamma"), default="dpo"),
    Gate("rlhf_type", ("rm",), ("center_rewards_coefficient",), default="dpo"),
)

SWIFT = Source(
    name="ms-swift",
    title="ms-swift",
    keys={
        **shared.TRAINING,
        **_BOTH,
        "use_dora": shared.PEFT["use_dora"],
        "attn_impl": Unneeded(shared.ATTENTION),
        "quant_bits": shared.NO_QUANTIZATION,
    },
    defaults={
        **shared.DEFAULTS,
        **_RLHF_DEFAULTS,
        "per_device_train_batch_size": Default("1"),
        "lr_scheduler_type": Default("cosine"),
        "weight_decay": Default("0.1"),
        "adam_beta2": Default("0.95"),
        "learning_rate": Default("1e-4"),
        "bf16": Default("true", unless=("fp16", "torch_dtype")),
    },
    gates=(
        *(gate for gate in shared.GATES if gate.key != "eval_strategy"),
        *_RLHF_GATES,
        Gate("train_type", ("lora",), _LORA, default="lora", also="tuner_type"),
    ),
    program=r"swift rlhf",
)

_MEGATRONS_NUMBERS = (
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
    "expert_tensor_parallel_size lr_warmup_iters lr_decay_iters recompute_num_layers moe_aux_loss_coeff "
    "moe_z_loss_coeff lr min_lr lr_warmup_fraction lr_warmup_init weight_decay clip_grad adam_beta1 adam_beta2 "
    "adam_eps optimizer_offload_fraction decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers"
)
_MEGATRONS_WORDS = (
    "recompute_granularity recompute_method lr_decay_style lr_wsd_decay_style fp8_format fp8_recipe main_grads_dtype "
    "main_params_dtype exp_avg_dtype exp_avg_sq_dtype moe_router_dtype moe_token_dispatcher_type "
    "pipeline_model_parallel_layout"
)
_MEGATRONS_SWITCHES = (
    "sequence_parallel use_distributed_optimizer overlap_grad_reduce overlap_param_gather optimizer_cpu_offload "
    "use_precision_aware_optimizer moe_grouped_gemm moe_permute_fusion moe_shared_expert_overlap moe_enable_deepep "
    "async_save use_persistent_ckpt_worker tp_comm_overlap fp8_param_gather manual_gc "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"
)

MEGATRON_SWIFT = replace(
    SWIFT,
    name="megatron-swift",
    title="Megatron-SWIFT",
    keys={
        **_BOTH,
        **same(_MEGATRONS_NUMBERS, "number"),
        **same(_MEGATRONS_WORDS),
        **switches(_MEGATRONS_SWITCHES),
        "moe_router_load_balancing_type": To("moe-router-load-balancing-type", "list"),
        "recompute_modules": To("recompute-modules", "list"),
        "virtual_pipeline_model_parallel_size": To("num-virtual-stages-per-pipeline-rank", "whole"),
        "global_batch_size": To("pairs-per-step", "whole"),
        "microbatch_group_size_per_vp_stage": To("microbatch-group-size-per-virtual-pipeline-stage", "whole"),
        "micro_batch_size": Unneeded("packs are sized by --seq-length"),
        "train_iters": To("train-iters", "whole", replaces=("num_train_epochs", "max_epochs")),
        "num_train_epochs": To("pair-epochs", "number"),
        "max_epochs": To("pair-epochs", "number"),
        "save": To("save", beside={"save-hf": "{}/hf"}),
        "save_interval": To("save-interval", "whole"),
        "eval_interval": To("eval-interval", "whole"),
        "log_interval": To("log-interval", "whole"),
        "load": To("pretrained-checkpoint"),
        "mcore_model": To("pretrained-checkpoint"),
        "ref_load": To("reference-model"),
        "mcore_ref_model": To("reference-model"),
        "save_safetensors": Unneeded("--save-hf writes the model beside the checkpoints"),
        "finetune": Choice({"true": "a run begins at step 0"}, "With the same --save a start goes on. Take it out."),
        "attention_backend": Unneeded(shared.ATTENTION),
        "cross_entropy_loss_fusion": Unneeded("log-probs are fused with the output layer"),
        "calculate_per_token_loss": Unneeded("every step is the mean over its pairs"),
        "optimizer": Choice({"adam": "Megatron's AdamW"}, "Take adam."),
        "eval_iters": Refused("Every evaluation covers all held-out pairs: take it out.", ("-1",)),
        **unneeded("checkpoints hold what a resumed run needs", "no_save_optim no_save_rng no_load_optim no_load_rng"),
        **unneeded(
            "Megatron's default is kept, or what --fuse-local-layers says",
            "masked_softmax_fusion bias_dropout_fusion bias_activation_fusion apply_rope_fusion max_shard_size "
            "gradient_accumulation_fusion cross_entropy_fusion_impl use_cpu_initialization perform_initialization",
        ),
        **unneeded(
            "counts with another rlhf_type only",
            "generation_batch_size steps_per_generation num_generations_eval importance_sampling_level tau_pos tau_neg "
            "real_tau fipo_decay_rate fipo_clip_range fipo_clip_high_only fipo_safety_threshold epsilon epsilon_high "
            "delta top_k top_p repetition_penalty use_vllm vllm_mode vllm_enable_prefix_caching "
            "vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_max_model_len vllm_enforce_eager "
            "vllm_limit_mm_per_prompt vllm_disable_cascade_attn vllm_max_num_seqs vllm_mm_processor_cache_gb "
            "vllm_engine_kwargs vllm_enable_lora sleep_level offload_optimizer offload_model offload_bridge "
            "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_server_group_port "
            "cosine_min_len_value_wrong cosine_max_len_value_wrong cosine_min_len_value_correct "
            "cosine_max_len_value_correct cosine_max_len repetition_n_grams repetition_max_penalty soft_max_length "
            "soft_cache_length dynamic_sample max_resample_times overlong_filter scale_rewards advantage_estimator "
            "kl_in_reward wandb_log_unique_prompts rollout_importance_sampling_mode "
            "rollout_importance_sampling_threshold log_rollout_offpolicy_metrics off_policy_sequence_mask_delta "
            "top_entropy_quantile router_replay_mode reward_model_plugin async_generate move_model_batches "
            "multi_turn_scheduler max_turns completion_length_limit_scope vllm_server_pass_dataset use_gym_env gym_env "
            "ref_model_sync_steps ref_model_mixup_alpha",
        ),
        "log_entropy": Switch("log-entropy"),
        **same("lr_wsd_decay_iters start_weight_decay end_weight_decay manual_gc_interval", "number"),
        **same("weight_decay_incr_style"),
        **unneeded(
            "Megatron's default is kept",
            "manual_gc_steps manual_gc_eval te_rng_tracker data_parallel_random_init mlp_padding_free "
            "dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable "
            "distrib_optim_fully_reshardable_mem_efficient "
            "local_rank data_parallel_sharding_strategy overlap_p2p_comm batch_p2p_comm align_param_gather "
            "align_grad_reduce nccl_comm_warmup tensorboard_queue_size fp8_amax_history_len fp8_amax_compute_algo "
            "apply_query_key_layer_scaling attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 "
            "moe_layer_recompute moe_pad_expert_input_to_capacity moe_token_drop_policy bridge_backend "
            "save_missing_weights cp_partition_mode sequence_packing_scheduler skip_megatron_init "
            "metric_for_best_model greater_is_better apply_wd_to_qk_layernorm",
        ),
        **unneeded(
            "of optimizers that are refused",
            "sgd_momentum muon_momentum muon_split_qkv muon_use_nesterov "
            "muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode "
            "muon_extra_scale_factor muon_scalar_optimizer",
        ),
        **unneeded(
            "of models that are not here",
            "mtp_loss_scaling_factor mtp_decoder_input_detach mtp_shared_weights "
            "vit_gradient_checkpointing vit_gradient_checkpointing_kwargs vit_attn_impl vit_lr aligner_lr "
            "dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss apply_dsa_kernel_fusion csa_dense_mode "
            "use_fused_mhc mhc_recompute_layer_num language_model_only linear_decoupled_in_proj mrl_dims",
        ),
        **refused(
            "Take it out.",
            "optimizer_cuda_graph overlap_param_gather_with_optimizer_step fp4_recipe "
            "fp4_param_gather enable_dft_loss enable_channel_loss callbacks mcore_adapter mcore_ref_adapter",
        ),
        **refused(
            "Take it out.",
            "use_megatron_fsdp mtp_num_layers fp4_format megatron_extra_kwargs cp_comm_type "
            "moe_expert_capacity_factor freeze_parameters trainable_parameters",
        ),
    },
    defaults={
        **_RLHF_DEFAULTS,
        "global_batch_size": Default("16"),
        "lr": Default("1e-5"),
        "min_lr": Default("0"),
        "lr_decay_style": Default("cosine"),
        "weight_decay": Default("0.1"),
        "adam_beta2": Default("0.95"),
        "clip_grad": Default("1.0"),
        "recompute_granularity": Default("selective"),
        "use_distributed_optimizer": Default("true"),
        "bf16": Default("true", unless=("fp16", "torch_dtype")),
        "save_steps": Default("500", unless=("save_interval",)),
    },
    gates=(
        Gate("train_type", ("lora",), _MEGATRONS_LORA, default="full", also="tuner_type"),
        Gate("output_dir", ("*",), ("save_steps", "save_total_limit")),
        *_RLHF_GATES,
    ),
    program=r"megatron rlhf",
)
