"""axolotl: YAML files with ``rl: dpo`` and its kind, or ``reward_model: true``."""

from __future__ import annotations

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Entry,
    Factor,
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
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_FORM = "rows are read by their columns: --pair-format finds the form, --pair-columns renames"
_BY_EPOCH = "Say {} (steps) or {} (time) in the recipe, and take it out."

_KEYS: dict[str, Entry] = {
    "base_model": To("hf-model"),
    "revision_of_model": To("hf-revision"),
    "rl": Loss(
        {"true": "dpo"},
        unless="dpo_loss_type",
        by_key={"dpo_norm_loss": {"true": dict.fromkeys(("true", "dpo"), "sigmoid_norm")}},
        notes={"orpo": shared.WITH_THE_PROMPT},
    ),
    "dpo_loss_type": Loss(
        {"sigmoid": "dpo"}, weights="dpo_loss_weights", notes={"sft": f"sft is {shared.OF_THE_BATCH}"}
    ),
    "dpo_loss_weights": Weights(),
    "dpo_use_weighting": LossOption("use_weighting", off=("false",), kind="switch"),
    "dpo_norm_loss": Choice(
        {"true": "the loss is sigmoid_norm", "false": "log-ratios are sums over the answer"}, "Take true or false."
    ),
    "reward_model": Choice({"true": {"objective": "reward"}, "false": "a policy is trained"}, "Take true or false."),
    "center_rewards_coefficient": To("center-rewards-coefficient", "number", off=("0", "0.0")),
    "num_labels": Refused("A reward model has one: 1.", ("1",)),
    "kto_desirable_weight": LossOption("desirable_weight"),
    "kto_undesirable_weight": LossOption("undesirable_weight"),
    "rl_beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "dpo_beta": LossOption("beta"),
    "trl.beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "orpo_alpha": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "rpo_alpha": LossOption("nll_weight", off=("0", "0.0"), note=shared.OF_THE_BATCH),
    "cpo_alpha": LossOption("nll_weight", off=("0", "0.0"), note=shared.OF_THE_BATCH),
    "simpo_gamma": LossOption("simpo_gamma"),
    "dpo_label_smoothing": LossOption("label_smoothing", off=("0", "0.0")),
    "precompute_ref_log_probs": Choice(
        {"true": {"reference": "precomputed"}, "false": {"reference": "resident"}}, "Take true or false."
    ),
    "datasets.path": To("pair-data", "list"),
    "datasets.split": Refused("Write it behind the name in the recipe: pair-data: [org/name:SPLIT].", ("train",)),
    "datasets.data_files": To("pair-data", "list"),
    **unneeded(_FORM, "datasets.type datasets.ds_type datasets.message_property_mappings.* datasets.roles.*"),
    "datasets.field_chosen": Refused("Say it: --pair-columns chosen=NAME.", ("chosen",)),
    "datasets.field_rejected": Refused("Say it: --pair-columns rejected=NAME.", ("rejected",)),
    "datasets.field_messages": Refused("Say it: --pair-columns prompt=NAME.", ("prompt", "messages", "conversation")),
    "test_datasets.path": To("eval-pair-data", "list"),
    **unneeded(_FORM, "test_datasets.type test_datasets.ds_type"),
    "test_datasets.split": Refused("Write it behind the name in the recipe: eval-pair-data: [org/name:SPLIT]."),
    "val_set_size": To("eval-share", "number", off=("0", "0.0")),
    "sequence_len": To("seq-length", "whole", times=shared.TWICE),
    "max_prompt_len": To("max-prompt-length", "whole"),
    "output_dir": To("save", beside={"save-hf": "{}/hf"}),
    "adapter": Choice({"lora": "--lora-rank says it"}, "Weights beside adapters are not quantised: take lora."),
    "lora_r": To("lora-rank", "whole"),
    "lora_alpha": To("lora-alpha", "number"),
    "lora_dropout": To("lora-dropout", "number"),
    "lora_target_linear": Choice({"true": {"lora-targets": "all-linear"}, "false": "targets are named"}, ""),
    "lora_target_modules": shared.LORA_TARGETS,
    "lora_model_dir": To("lora-start"),
    "peft_use_rslora": Choice({"true": {"lora-scaling": "sqrt-rank"}, "false": "alpha / rank is the default"}, ""),
    "chat_template_kwargs": Refused("Say it: --chat-template-kwargs JSON."),
    **refused(
        "Put it into the tokenizer's files.",
        "chat_template_jinja eot_tokens tokens added_tokens_overrides "
        "fix_untrained_tokens default_system_message tokenizer_use_mistral_common",
    ),
    "datasets.revision": Refused("Download that revision, and give its files."),
    "datasets.field_prompt": Refused("Say it: --pair-columns prompt=NAME.", ("prompt",)),
    "datasets.field_system": Refused("Put it into the rows: a message of the role system.", ("system",)),
    **refused(
        "Rows of text are joined as they are: put it into them.",
        "datasets.prompt_format datasets.chosen_format datasets.rejected_format",
    ),
    "peft_use_dora": Choice({"true": {"lora-type": "dora"}, "false": "plain LoRA is the default"}, ""),
    "load_in_8bit": shared.NO_QUANTIZATION,
    "load_in_4bit": shared.NO_QUANTIZATION,
    "micro_batch_size": Factor("pairs-per-step", of_each_process=True),
    "gradient_accumulation_steps": Factor("pairs-per-step"),
    "num_epochs": To("pair-epochs", "number"),
    "max_steps": To("train-iters", "whole", off=("-1", "0"), replaces=("num_epochs",)),
    "learning_rate": To("lr", "number"),
    "lr_scheduler": shared.SCHEDULE,
    "warmup_steps": To("lr-warmup-iters", "whole", off=("0",)),
    "warmup_ratio": To("lr-warmup-fraction", "number", off=("0", "0.0")),
    "optimizer": shared.OPTIMIZER,
    "weight_decay": To("weight-decay", "number"),
    "adam_beta1": To("adam-beta1", "number"),
    "adam_beta2": To("adam-beta2", "number"),
    "adam_epsilon": To("adam-eps", "number"),
    "max_grad_norm": To("clip-grad", "number"),
    "bf16": Switch("bf16"),
    "fp16": Switch("fp16"),
    "gradient_checkpointing": shared.RECOMPUTE,
    "save_steps": To("save-interval", "whole"),
    "save_total_limit": To("keep-checkpoints", "whole"),
    "saves_per_epoch": Refused(_BY_EPOCH.format("save-interval", "save-every")),
    "eval_steps": To("eval-interval", "whole"),
    "evals_per_epoch": Refused(_BY_EPOCH.format("eval-interval", "eval-every")),
    "save_strategy": shared.TRAINING["save_strategy"],
    "eval_strategy": shared.TRAINING["eval_strategy"],
    "logging_steps": To("log-interval", "whole"),
    "seed": To("seed", "whole"),
    "resume_from_checkpoint": shared.TRAINING["resume_from_checkpoint"],
    "auto_resume_from_checkpoints": Unneeded("a start with the same --save goes on from what is there"),
    "chat_template": Unneeded(shared.TEMPLATE),
    "special_tokens": Unneeded("tokens are the tokenizer's own"),
    "special_tokens.pad_token": Unneeded(shared.PACKED),
    "special_tokens.*": Refused("Tokens are the tokenizer's own: set it in the tokenizer's files."),
    "tensor_parallel_size": To("tensor-model-parallel-size", "whole"),
    "context_parallel_size": To("context-parallel-size", "whole"),
    "sequence_parallel_degree": To("context-parallel-size", "whole"),
    **unneeded("the model's config.json says it", "model_type tokenizer_type is_llama_derived_model trust_remote_code"),
    **unneeded(shared.PACKED, "sample_packing eval_sample_packing pad_to_sequence_len group_by_length"),
    **unneeded(shared.ATTENTION, "flash_attention xformers_attention sdp_attention attn_implementation"),
    **unneeded(
        shared.LOGGING,
        "wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode use_wandb "
        "use_tensorboard mlflow_tracking_uri comet_project_name logging_dir use_swanlab swanlab_project "
        "swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace swanlab_log_model",
    ),
    **unneeded(shared.SHARDING, "deepspeed fsdp fsdp.* fsdp_config fsdp_config.* fsdp_version dp_shard_size"),
    **unneeded(shared.LOADING, "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor"),
    **unneeded(
        "rows are tokenized once and kept",
        "dataset_prepared_path dataset_processes shuffle_merged_datasets skip_prepare_dataset",
    ),
    **unneeded("only answers are scored", "train_on_inputs"),
    **unneeded(shared.OF_THE_HUB, "hub_model_id hub_strategy push_dataset_to_hub"),
    **unneeded(
        "Megatron has its own way",
        "tf32 local_rank debug strict gradient_checkpointing_kwargs gradient_checkpointing_kwargs.* torch_compile "
        "save_safetensors eval_table_size eval_max_new_tokens eval_batch_size lora_fan_in_fan_out ddp_timeout "
        "remove_unused_columns dpo_use_logits_to_keep dpo_padding_free lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "save_only_model",
    ),
    **unneeded(shared.LOADING, "dataloader_drop_last shuffle_before_merging_datasets"),
    **unneeded(
        shared.SHARDING,
        "accelerator_config device device_map world_size ddp ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_find_unused_parameters max_memory gpu_memory_limit low_cpu_mem_usage "
        "fsdp_final_state_dict_type dp_replicate_size deepcompile activation_offloading layer_offloading "
        "heads_k_stride ring_attn_func use_ray ray_run_name ray_num_workers resources_per_worker",
    ),
    **unneeded(
        shared.ATTENTION,
        "flex_attention flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_fuse_mlp "
        "flash_optimum sage_attention eager_attention large_head_attention sdpa_varlen fused_attn_kernel "
        "s2_attention flash_attn_rms_norm flash_attn_d512 gemma4_hybrid_attn_impl",
    ),
    **unneeded(
        shared.PACKED,
        "eval_sequence_len sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method pad_to_multiple_of batch_flattening "
        "multipack_real_batches max_packed_sequence_len pretrain_multipack_buffer_size "
        "pretrain_multipack_attn pretraining_sample_concatenation",
    ),
    **unneeded(
        "log-probs are fused with the output layer",
        "dpo_use_liger_kernel chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks lora_embedding_kernel tiled_mlp tiled_mlp_num_shards "
        "tiled_mlp_use_original_mlp use_kernels experts_implementation",
    ),
    **unneeded(
        shared.LOGGING,
        "use_mlflow mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet "
        "comet_api_key comet_workspace comet_experiment_key comet_mode comet_online comet_experiment_config "
        "use_otel_metrics otel_metrics_host otel_metrics_port use_trackio trackio_project_name "
        "trackio_run_name trackio_space_id include_tokens_per_second include_tkps profiler_steps "
        "profiler_steps_start gradio_title gradio_share gradio_server_name gradio_server_port "
        "gradio_max_new_tokens gradio_temperature",
    ),
    **unneeded(
        "its own bookkeeping",
        "is_preprocess preprocess_iterable total_num_tokens total_supervised_tokens "
        "sample_packing_eff_est axolotl_config_path dataset_keep_in_memory dataset_num_proc dataset_shard_num "
        "dataset_shard_idx num_dataset_shards_to_save hf_use_auth_token gc_steps torch_empty_cache_steps "
        "gc_collect_steps torch_compile_backend torch_compile_mode torch_compile_options save_first_step "
        "tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files processor_type processor_kwargs",
    ),
    **unneeded(
        "the model's config.json says it",
        "is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model type_of_model",
    ),
    **unneeded(
        "of its evaluations by generating",
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval "
        "bench_dataset bench_split metric_for_best_model greater_is_better",
    ),
    **unneeded(
        "counts with what is refused",
        "generation_max_new_tokens generation_temperature generation_top_p generation_top_k generation_prompt_ratio "
        "generation_do_sample dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank "
        "qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size image_size "
        "image_resize_algorithm role_boundaries role_boundaries.*",
    ),
    **unneeded("a loss that is not finite ends a run", "loss_watchdog_threshold loss_watchdog_patience"),
    **unneeded(
        shared.NOT_QUANTIZED,
        "bnb_config_kwargs model_quantization_config model_quantization_config_kwargs "
        "gptq qlora_sharded_model_loading lora_on_cpu peft_autocast_adapter_dtype",
    ),
    "excess_length_strategy": Choice({"drop": {"long-pairs": "drop"}, "raise": "the default"}, "Take drop."),
    "evaluation_strategy": shared.TRAINING["eval_strategy"],
    "bfloat16": Switch("bf16"),
    "float16": Switch("fp16"),
    "float32": Unneeded("--bf16 says it"),
    "dpo_generate_during_eval": Refused("Take it out; --eval-prompts FILE has answers at every evaluation."),
    **unneeded("an adapter's base is the reference", "rl_adapter_ref_model"),
    **refused(
        "Take it out.",
        "dataset_exact_deduplication resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings "
        "embeddings_skip_upcast reinit_weights trainer_cls vllm vllm.* ebft ebft.* qat qat.* quantization "
        "quantization.* dynamic_checkpoint dynamic_checkpoint.* process_reward_model pretraining_dataset fp8 "
        "fp8_enable_fsdp_float8_all_gather selective_checkpointing freeze_mm_modules min_sample_len "
        "curriculum_sampling use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks streaming "
        "streaming_multipack_buffer_size quantize_moe_experts scaling_softmax scaling_softmax_factor "
        "scaling_softmax_bias use_eaft eaft_alpha eaft_k llama4_linearized_experts fp32_norms fp32_norm_classes "
        "load_best_model_at_end generate_samples num_generation_samples base_model_config cls_model_config "
        "tokenizer_config experimental_skip_move_to_device use_onebitllms hub_revision lora_target_parameters "
        "lora_rank_pattern lora_alpha_pattern peft_layers_to_transform peft_layers_pattern peft peft.* "
        "peft_layer_replication peft_init_lora_weights peft_trainable_token_indices peft_ensure_weight_tying "
        "loraplus_lr_embedding merge_lora merge_method relora relora_prune_ratio relora_prune_method "
        "relora_cpu_offload batch_size auto_find_batch_size embedding_lr embedding_lr_scale optim_args "
        "optim_target_modules torchdistx_path lr_scheduler_kwargs lr_scheduler_kwargs.* lr_quadratic_warmup "
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups adam_epsilon2 adam_beta3 "
        "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps lisa_n_layers "
        "lisa_step_interval lisa_layers_attribute rope_scaling noisy_embedding_alpha overrides_of_model_config "
        "overrides_of_model_config.* overrides_of_model_kwargs overrides_of_model_kwargs.* "
        "early_stopping_patience lora_modules_to_save loraplus_lr_ratio plugins "
        "neftune_noise_alpha unfrozen_parameters trl.*",
    ),
}

AXOLOTL = Source(
    name="axolotl",
    title="axolotl",
    keys=_KEYS,
    defaults={
        "lr_scheduler": Default("cosine"),
        "weight_decay": Default("0.0"),
        "adam_beta2": Default("0.999"),
        "max_grad_norm": Default("1.0"),
        "rl_beta": Default("0.1", unless=("dpo_beta", "trl.beta", "orpo_alpha")),
        "cpo_alpha": Default("1.0"),
        "num_epochs": Default("1.0"),
        "save_steps": Default("500", unless=("saves_per_epoch", "save_strategy")),
        "seed": Default("42"),
    },
    gates=(
        Gate("rl", ("*",), ("rl_beta", "dpo_beta", "trl.beta", "orpo_alpha")),
        Gate("rl", ("simpo",), ("cpo_alpha", "simpo_gamma"), default=""),
        Gate("rl", ("kto",), ("kto_desirable_weight", "kto_undesirable_weight"), default=""),
        Gate("reward_model", ("true",), ("center_rewards_coefficient", "num_labels")),
        Gate(
            "adapter",
            ("lora", "qlora"),
            ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_model_dir"),
        ),
        Gate("output_dir", ("*",), ("save_steps", "save_total_limit")),
        Gate("lr_scheduler", ("linear", "cosine", "constant_with_warmup"), ("warmup_steps", "warmup_ratio"), "cosine"),
    ),
    program=r"axolotl train|axolotl\.cli\.train",
)
