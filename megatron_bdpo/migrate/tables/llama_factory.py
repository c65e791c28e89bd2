"""LLaMA-Factory: ``llamafactory-cli train FILE`` with ``stage: dpo``, ``kto`` or ``rm``."""

from __future__ import annotations

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Entry,
    Gate,
    Loss,
    LossOption,
    Refused,
    Source,
    To,
    Unneeded,
    refused,
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_REGISTERED = "Names are those of its dataset_info.json: say in the recipe what files or hub names they stand for: {}."

_KEYS: dict[str, Entry] = {
    **shared.TRAINING,
    **shared.PEFT,
    "model_name_or_path": To("hf-model"),
    "model_revision": To("hf-revision", off=("main",)),
    "stage": Choice(
        {"dpo": "the loss is --preference-loss", "kto": {"preference-loss": "kto"}, "rm": {"objective": "reward"}},
        "This program trains on pairs and on labelled answers: stage dpo, kto or rm.",
    ),
    "finetuning_type": Choice({"lora": "--lora-rank says it", "full": "all weights are trained"}, "Take lora or full."),
    "lora_rank": To("lora-rank", "whole"),
    "lora_target": shared.LORA_TARGETS,
    "adapter_name_or_path": To("lora-start"),
    "pref_beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "pref_bco_weight": Refused(
        "A mix has it: --preference-loss dpo=1,bco_pair=WEIGHT, with bco_pair's rewards not shifted by their mean."
    ),
    "pref_ftx": LossOption("nll_weight", off=("0", "0.0")),
    "pref_loss": Loss({"sigmoid": "dpo"}),
    "kto_chosen_weight": LossOption("desirable_weight"),
    "kto_rejected_weight": LossOption("undesirable_weight"),
    "dpo_label_smoothing": LossOption("label_smoothing", off=("0", "0.0")),
    "simpo_gamma": LossOption("simpo_gamma"),
    "ref_model": To("reference-model"),
    "dataset": Refused(_REGISTERED.format("pair-data")),
    "eval_dataset": Refused(_REGISTERED.format("eval-pair-data")),
    "val_size": To("eval-share", "number", off=("0", "0.0")),
    "cutoff_len": To("seq-length", "whole", times=shared.TWICE),
    "max_samples": To("max-pairs", "whole"),
    "template": Unneeded(shared.TEMPLATE),
    "quantization_bit": shared.NO_QUANTIZATION,
    "flash_attn": Unneeded(shared.ATTENTION),
    "pure_bf16": Refused("Weights of the optimizer are fp32. Take bf16."),
    "enable_thinking": Choice(
        {
            "true": {"chat-template-kwargs": '{"enable_thinking": true}'},
            "false": {"chat-template-kwargs": '{"enable_thinking": false}'},
        },
        "Take true or false.",
    ),
    "disable_gradient_checkpointing": Choice(
        {"true": "nothing is recomputed", "false": shared.FULL_RECOMPUTE}, "Take true or false."
    ),
    "report_to": Unneeded(shared.LOGGING),
    **unneeded(shared.LOGGING, "plot_loss use_swanlab swanlab_project swanlab_run_name swanlab_mode swanlab_api_key"),
    **unneeded(shared.PACKED, "packing neat_packing"),
    **unneeded(
        "rows are tokenized once and kept",
        "overwrite_cache dataset_dir media_dir tokenized_path cache_dir preprocessing_batch_size",
    ),
    **unneeded("the tokenizer is the model's own", "use_fast_tokenizer split_special_tokens"),
    **unneeded("weights are read into each rank's part", "low_cpu_mem_usage use_unsloth enable_liger_kernel"),
    **unneeded(
        "another stage's",
        "ppo_buffer_size ppo_epochs ppo_score_norm "
        "ppo_target ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit "
        "reward_model_type max_new_tokens top_p temperature predict_with_generate",
    ),
    **unneeded(
        "another finetuning_type's",
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules "
        "module_dropout oft_rank oft_block_size oft_target",
    ),
    **unneeded(
        "counts with an optimizer that is refused",
        "galore_target galore_rank galore_update_interval "
        "galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank apollo_update_interval "
        "apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front "
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose",
    ),
    **unneeded(
        "of models with images or sound",
        "image_max_pixels image_min_pixels image_do_pan_and_scan "
        "crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate freeze_multi_modal_projector freeze_language_model",
    ),
    **unneeded(
        "of its other commands",
        "export_dir export_size export_device export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen "
        "export_legacy_format export_hub_model_id infer_backend infer_dtype offload_folder use_kv_cache "
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend eval_num_beams "
        "compute_accuracy hf_hub_token ms_hub_token om_hub_token",
    ),
    **unneeded(
        shared.NOT_QUANTIZED, "quantization_method quantization_type double_quantization quantization_device_map"
    ),
    **unneeded(
        shared.SHARDING,
        "device_map use_megatron_bridge megatron_bridge_args use_mca use_hyper_parallel "
        "hyper_parallel_args hyper_parallel_cp_size ray_num_workers ray_init_kwargs ray_run_name "
        "ray_storage_path resources_per_worker placement_strategy master_addr master_port",
    ),
    **unneeded(shared.LOADING, "buffer_size data_shared_file_system"),
    **unneeded(
        shared.LOGGING,
        "swanlab_workspace swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret "
        "print_param_status include_effective_tokens_per_second",
    ),
    **unneeded(
        "--profile has Megatron's",
        "enable_torch_profiler profiler_output_dir profiler_wait_steps "
        "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes "
        "profiler_profile_memory profiler_with_stack profile_modules",
    ),
    **unneeded(
        "Megatron has its own way",
        "use_reentrant_gc use_unsloth_gc upcast_layernorm upcast_lmhead_output "
        "use_v1_kernels compute_dtype model_max_length block_diag_attn ignore_pad_token_for_loss "
        "eval_on_each_dataset",
    ),
    "moe_aux_loss_coef": To("moe-aux-loss-coeff", "number"),
    "create_new_adapter": Refused("Adapters of --lora-start are gone on with: false."),
    "disable_shuffling": Refused("Pairs are shuffled: false."),
    "mix_strategy": Refused("Sources are concatenated, or weighed: pair-data: [0.5, A, 0.5, B].", ("concat",)),
    "interleave_probs": Refused("Give weights in the recipe: pair-data: [0.5, A, 0.5, B]."),
    **refused(
        "Put it into the rows, or into the tokenizer's template.", "tool_format default_system preserve_thinking"
    ),
    "ld_alpha": Refused(shared.LD_ALPHA, ("none", "null", "1", "1.0")),
    **refused(
        "Take it out.",
        "use_adam_mini use_muon use_asft_loss asft_alpha use_eaft_loss eaft_alpha early_stopping_steps "
        "pissa_iter pissa_convert loraplus_lr_embedding adapter_folder add_tokens add_special_tokens "
        "new_special_tokens_config init_special_tokens mixture_of_depths train_from_scratch "
        "ref_model_quantization_bit use_kt kt_cpu_activation kt_weight_path kt_non_expert_weight_path "
        "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size fp8 "
        "fp8_backend fp8_enable_fsdp_float8_all_gather "
        "loraplus_lr_ratio pissa_init use_galore use_apollo use_badam use_llama_pro "
        "additional_target ref_model_adapters freeze_vision_tower resize_vocab new_special_tokens streaming "
        "rope_scaling shift_attn mask_history train_on_prompt use_dft_loss",
    ),
}

LLAMA_FACTORY = Source(
    name="llama-factory",
    title="LLaMA-Factory",
    keys=_KEYS,
    defaults={
        **shared.DEFAULTS,
        "pref_loss": Default("sigmoid"),
        "pref_beta": Default("0.1"),
        "cutoff_len": Default("2048"),
        "simpo_gamma": Default("0.5"),
        "lora_rank": Default("8"),
    },
    gates=(
        *shared.GATES,
        Gate("stage", ("dpo",), ("pref_loss", "dpo_label_smoothing"), default="dpo"),
        Gate("stage", ("dpo", "kto"), ("pref_beta", "pref_ftx"), default="dpo"),
        Gate("stage", ("kto",), ("kto_chosen_weight", "kto_rejected_weight"), default="dpo"),
        Gate(
            "finetuning_type",
            ("lora",),
            (
                "lora_rank",
                "lora_alpha",
                "lora_dropout",
                "lora_target",
                "use_rslora",
                "use_dora",
                "adapter_name_or_path",
            ),
            default="lora",
        ),
        Gate("pref_loss", ("simpo",), ("simpo_gamma",), default="sigmoid"),
    ),
    program=r"(?:llamafactory-cli|lmf) train",
)
