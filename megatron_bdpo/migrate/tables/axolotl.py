"""axolotl: YAML files with ``rl: dpo``."""

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
    refused,
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_FORM = "rows are read by their columns: --pair-format finds the form, --pair-columns renames"
_BY_EPOCH = "Say {} (steps) or {} (time) in the recipe, and take it out."

_KEYS: dict[str, Entry] = {
    "base_model": To("hf-model"),
    "revision_of_model": To("hf-revision"),
    "rl": Loss({"true": "dpo"}),
    "rl_beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "dpo_beta": LossOption("beta"),
    "trl.beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "orpo_alpha": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "rpo_alpha": LossOption("nll_weight", off=("0", "0.0")),
    "cpo_alpha": LossOption("nll_weight", off=("0", "0.0")),
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
    "datasets.field_messages": Refused("Say it: --pair-columns prompt=NAME.", ("prompt", "messages")),
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
        "use_tensorboard mlflow_tracking_uri comet_project_name logging_dir",
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
    **unneeded("an adapter's base is the reference", "rl_adapter_ref_model"),
    **refused(
        "Take it out.",
        "dataset_exact_deduplication "
        "dpo_use_weighting dpo_norm_loss early_stopping_patience lora_modules_to_save loraplus_lr_ratio plugins "
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
        "num_epochs": Default("1.0"),
        "save_steps": Default("500", unless=("saves_per_epoch", "save_strategy")),
        "seed": Default("42"),
    },
    gates=(
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
