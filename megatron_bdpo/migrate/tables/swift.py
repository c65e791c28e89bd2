"""ms-swift: ``swift rlhf --rlhf_type dpo`` on transformers, and ``megatron rlhf --rlhf_type dpo`` on Megatron."""

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
    refused,
    same,
    switches,
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "adapters")
_MEGATRONS_LORA = tuple(name for name in _LORA if name not in ("adapters", "use_dora"))
_SAMPLED = {"#": "Give --max-pairs N in the place of NAME#N, or NAME:train[:N]."}
_TUNER = Choice({"lora": "--lora-rank says it", "full": "all weights are trained"}, "Take lora or full.")

#: What both programs have.
_BOTH: dict[str, Entry] = {
    "rlhf_type": Choice(
        {
            "dpo": "the loss is --preference-loss",
            "orpo": {"preference-loss": "orpo"},
            "cpo": {"preference-loss": "cpo"},
        },
        "This program trains on preference pairs: dpo.",
    ),
    "model": To("hf-model"),
    "model_revision": To("hf-revision"),
    "ref_model": To("reference-model"),
    "loss_type": Loss({"sigmoid": "dpo"}),
    "beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "rpo_alpha": LossOption("nll_weight", off=("0", "0.0")),
    "cpo_alpha": LossOption("nll_weight"),
    "simpo_gamma": LossOption("simpo_gamma"),
    "label_smoothing": LossOption("label_smoothing", off=("0", "0.0")),
    "f_divergence_type": Refused("The divergence is reverse_kl: take it out.", ("reverse_kl",)),
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
    **refused(
        "Take it out.", "reference_free ld_alpha sync_ref_model modules_to_save target_regex lora_bias loss_scale"
    ),
    "packing": Refused("With it a batch counts packs, not pairs: take it out; pairs are packed here in any case."),
}

_RLHF_DEFAULTS = {
    "rlhf_type": Default("dpo"),
    "loss_type": Default("sigmoid", unless=("rlhf_type",)),
    "beta": Default("0.1"),
    "lora_rank": Default("8"),
    "lora_alpha": Default("32"),
    "lora_dropout": Default("0.05"),
    "seed": Default("42"),
    "save_steps": Default("500"),
}
_LOSS_OF_DPO = {**_RLHF_DEFAULTS, "loss_type": Default("sigmoid")}

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
        **_LOSS_OF_DPO,
        "per_device_train_batch_size": Default("1"),
        "lr_scheduler_type": Default("cosine"),
        "weight_decay": Default("0.1"),
        "adam_beta2": Default("0.95"),
        "learning_rate": Default("1e-4"),
        "bf16": Default("true", unless=("fp16", "torch_dtype")),
    },
    gates=(
        *(gate for gate in shared.GATES if gate.key != "eval_strategy"),
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
        **refused(
            "Take it out.",
            "use_megatron_fsdp mtp_num_layers fp4_format megatron_extra_kwargs cp_comm_type "
            "moe_expert_capacity_factor freeze_parameters trainable_parameters",
        ),
    },
    defaults={
        **_LOSS_OF_DPO,
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
    ),
    program=r"megatron rlhf",
)
