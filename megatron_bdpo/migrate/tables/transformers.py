"""What trainers on transformers' ``Trainer`` have in common: keys of its ``TrainingArguments``, and PEFT's."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Entry,
    Factor,
    Gate,
    LossOption,
    Refused,
    ShareOrCount,
    Switch,
    To,
    Unneeded,
    refused,
    unneeded,
)

SHARDING = "how memory is shared is the layout's: --use-distributed-optimizer, parallel sizes (megatron-bdpo plan)"
LOADING = "packs are planned ahead of a step and need no loader"
LOGGING = "metrics.jsonl in --save has them; also to --tensorboard-dir, or --wandb-project with --wandb-exp-name"
TEMPLATE = "rows are formatted by the chat template of the model's tokenizer; another one has to stand there"
ATTENTION = "--pair-attention chooses the kernel"
PACKED = "pairs are packed in any case, and nothing is padded but a pack's end"
OF_THE_HUB = "nothing is pushed to a hub"
REFERENCE_BATCH = "the reference is scored in packs, too"

FULL_RECOMPUTE = {
    "recompute-granularity": "full",
    "recompute-method": "uniform",
    "recompute-num-layers": "1",
}
RECOMPUTE = Choice(
    {"true": FULL_RECOMPUTE, "unsloth": FULL_RECOMPUTE, "false": "nothing is recomputed"},
    "Say --recompute-granularity in the recipe.",
)
NO_QUANTIZATION = Refused(
    "Adapters stand beside weights in half precision. Take it out; a larger --tensor-model-parallel-size makes room."
)
SCHEDULES: Mapping[str, Mapping[str, bool | str | list[str]]] = {
    "linear": {"lr-decay-style": "linear", "min-lr": "0"},
    "cosine": {"lr-decay-style": "cosine", "min-lr": "0"},
    "cosine_with_min_lr": {"lr-decay-style": "cosine"},
    "constant": {"lr-decay-style": "constant"},
    "constant_with_warmup": {"lr-decay-style": "constant"},
}
SCHEDULE = Choice(SCHEDULES, f"Take one of {', '.join(SCHEDULES)}, or say --lr-decay-style in the recipe.")
_ADAMS = "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused paged_adamw_32bit"
#: f-DPO's and WPO's, with TRL's names. (LD-DPO's is not: elsewhere it leaves the reference's log-probs whole.)
MODIFIERS: dict[str, Entry] = {
    "f_divergence_type": LossOption("f_divergence", off=("reverse_kl",), kind="word"),
    "f_alpha_divergence_coef": LossOption("f_alpha_divergence_coef"),
    "reference_free": LossOption("reference_free", off=("false",), kind="switch"),
    "use_weighting": LossOption("use_weighting", off=("false",), kind="switch"),
}
LD_ALPHA = (
    "There it weighs the policy's log-probs and not the reference's, which is another loss; --ld-alpha weighs both."
)
#: Of TRL's CPOTrainer, and of those who use it.
LOSSES_OF_CPO: Mapping[str, str | Refused] = {
    "sigmoid": "cpo",
    **{
        name: Refused(
            f"CPO's has no reference. Take it out, and say in the recipe preference-loss: {name}, reference-free: true."
        )
        for name in ("hinge", "ipo")
    },
}
ALPHA_DIVERGENCE = Gate("f_divergence_type", ("alpha_divergence",), ("f_alpha_divergence_coef",), default="reverse_kl")
#: KTO's and its kind's.
WEIGHTS_OF_LABELS: dict[str, Entry] = {
    "desirable_weight": LossOption("desirable_weight"),
    "undesirable_weight": LossOption("undesirable_weight"),
}

ADAM = dict.fromkeys(_ADAMS.split(), "Megatron's AdamW")
OPTIMIZER = Choice(ADAM, "Its numbers are another optimizer's. Take adamw_torch.")

NOT_QUANTIZED = "weights are not quantised"

#: Of NLL terms.
OF_THE_BATCH = "a mean over the batch's tokens there, over pairs here"

#: Of ORPO's, in TRL's trainer.
WITH_THE_PROMPT = "its NLL is of prompt and answer there, over the batch's tokens; here of the answer, over pairs"

#: Two sequences of this length with one prompt are what a pack has to hold at least.
TWICE = 2

LORA_TARGETS = To("lora-targets", "commas", words={"all": "all-linear"})

PEFT: dict[str, Entry] = {
    "lora_alpha": To("lora-alpha", "number"),
    "lora_dropout": To("lora-dropout", "number"),
    "use_rslora": Choice({"true": {"lora-scaling": "sqrt-rank"}, "false": "alpha / rank is the default"}, ""),
    "use_dora": Choice({"true": {"lora-type": "dora"}, "false": "plain LoRA is the default"}, ""),
}

#: transformers' TrainingArguments.
TRAINING: dict[str, Entry] = {
    "output_dir": To("save", beside={"save-hf": "{}/hf"}),
    "per_device_train_batch_size": Factor("pairs-per-step", of_each_process=True),
    "gradient_accumulation_steps": Factor("pairs-per-step"),
    "num_train_epochs": To("pair-epochs", "number"),
    "max_steps": To("train-iters", "whole", off=("-1", "0"), replaces=("num_train_epochs",)),
    "learning_rate": To("lr", "number"),
    "lr_scheduler_type": SCHEDULE,
    "lr_scheduler_kwargs.min_lr": To("min-lr", "number"),
    "warmup_steps": ShareOrCount("lr-warmup-fraction", "lr-warmup-iters"),
    "warmup_ratio": ShareOrCount("lr-warmup-fraction", "lr-warmup-iters"),
    "optim": OPTIMIZER,
    "weight_decay": To("weight-decay", "number"),
    "adam_beta1": To("adam-beta1", "number"),
    "adam_beta2": To("adam-beta2", "number"),
    "adam_epsilon": To("adam-eps", "number"),
    "max_grad_norm": To("clip-grad", "number"),
    "bf16": Switch("bf16"),
    "fp16": Switch("fp16"),
    "gradient_checkpointing": RECOMPUTE,
    "activation_checkpointing": RECOMPUTE,
    "logging_steps": To("log-interval", "whole"),
    "save_strategy": Choice(
        {"steps": "--save-interval says how often"},
        "Checkpoints go by steps or by the clock: take save_steps, or take it out and say --save-every in the recipe.",
    ),
    "save_steps": To("save-interval", "whole"),
    "save_total_limit": To("keep-checkpoints", "whole"),
    "eval_strategy": Choice(
        {"no": "nothing is held out", "steps": "--eval-interval says how often"},
        "Evaluations go by steps or by the clock: take eval_steps, or say --eval-every in the recipe.",
    ),
    "evaluation_strategy": Choice({"no": "nothing is held out", "steps": "--eval-interval says how often"}, ""),
    "eval_steps": To("eval-interval", "whole"),
    "eval_on_start": Switch("eval-at-start"),
    "seed": To("seed", "whole"),
    "full_determinism": Switch("deterministic-mode"),
    "router_aux_loss_coef": To("moe-aux-loss-coeff", "number"),
    "resume_from_checkpoint": Choice(
        {"true": "a start with the same --save goes on from what is there", "false": "--overwrite begins again"},
        "Checkpoints of theirs cannot be gone on with. Start from their model: --hf-model.",
    ),
    "report_to": Unneeded(LOGGING),
    "run_name": Unneeded(LOGGING),
    "data_seed": Unneeded("--seed shuffles, too"),
    "use_cpu": Unneeded("a machine without a GPU trains on its CPU"),
    "ddp_timeout": Unneeded("--distributed-timeout-minutes, and --phase-limit for a rank that stands still"),
    "do_train": Unneeded("the program trains"),
    "trust_remote_code": Unneeded("no code of a model's directory is run"),
    "save_only_model": Unneeded("--save-hf writes the model, checkpoints hold what a resumed run needs"),
    **unneeded(
        SHARDING,
        "deepspeed fsdp fsdp.* fsdp_config fsdp_config.* accelerator_config accelerator_config.* parallelism_config "
        "parallelism_config.* activation_offloading fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    ),
    **unneeded(
        LOADING,
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
        "train_sampling_strategy group_by_length length_column_name ignore_data_skip split_batches",
    ),
    **unneeded("tokenizing takes all cores: --tokenizer-workers", "dataset_num_proc preprocessing_num_workers"),
    **unneeded(
        "evaluations are packed as the steps are, over all held-out pairs",
        "per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps eval_delay include_for_metrics batch_eval_metrics do_eval do_predict bf16_full_eval "
        "fp16_full_eval label_names",
    ),
    **unneeded(
        LOGGING,
        "logging_strategy logging_first_step logging_dir log_on_each_node logging_nan_inf_filter log_level "
        "log_level_replica disable_tqdm include_num_input_tokens_seen include_tokens_per_second project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    **unneeded(OF_THE_HUB, "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"),
    **unneeded(
        "Megatron has its own way",
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank "
        "torch_empty_cache_steps skip_memory_metrics debug gradient_checkpointing_kwargs "
        "gradient_checkpointing_kwargs.* activation_checkpointing_kwargs activation_checkpointing_kwargs.* tf32 "
        "torch_compile torch_compile_backend torch_compile_mode use_cache save_safetensors save_on_each_node "
        "enable_jit_checkpoint restore_callback_states_from_checkpoint overwrite_output_dir",
    ),
    **unneeded("log-probs are fused with the output layer", "use_liger_kernel liger_kernel_config"),
    **unneeded("every step is the mean over its pairs", "average_tokens_across_devices"),
    **unneeded("best checkpoints are not told apart", "metric_for_best_model greater_is_better"),
    **refused("Take it out, or export with --save-hf and push that.", "push_to_hub"),
    **refused("The newest are kept: take it out, and say --keep-checkpoints N.", "load_best_model_at_end"),
    **refused("Size packs with --seq-length: take it out.", "auto_find_batch_size"),
    **refused(
        "Take it out.",
        "neftune_noise_alpha label_smoothing_factor optim_args optim_target_modules lr_scheduler_kwargs "
        "lr_scheduler_kwargs.* model_init_kwargs model_init_kwargs.*",
    ),
}

#: What transformers does where nothing is said, and Megatron does something else.
DEFAULTS: Mapping[str, Default] = {
    "per_device_train_batch_size": Default("8"),
    "num_train_epochs": Default("3.0"),
    "learning_rate": Default("5e-5"),
    "lr_scheduler_type": Default("linear"),
    "weight_decay": Default("0.0"),
    "adam_beta2": Default("0.999"),
    "max_grad_norm": Default("1.0"),
    "save_steps": Default("500"),
    "eval_steps": Default("500", same_as="logging_steps"),
    "seed": Default("42"),
}

GATES = (
    Gate("eval_strategy", ("steps", "epoch"), ("eval_steps", "eval_on_start"), default="no"),
    Gate("save_strategy", ("steps",), ("save_steps",), default="steps"),
    Gate("output_dir", ("*",), ("save_steps", "save_strategy", "save_total_limit")),
    Gate(
        "lr_scheduler_type",
        ("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup"),
        ("warmup_steps", "warmup_ratio"),
        default="linear",
    ),
)
