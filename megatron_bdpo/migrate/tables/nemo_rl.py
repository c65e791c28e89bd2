"""NeMo-RL: its ``dpo.yaml``, for Megatron (``policy.megatron_cfg``) and for DTensor (``policy.dtensor_cfg``)."""

from __future__ import annotations

from dataclasses import replace

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Each,
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
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_BUILT_IN = Choice(
    {"PreferenceDataset": "data_path says where it is", "BinaryPreferenceDataset": "data_path says where it is"},
    "It is one of NeMo-RL's own: name its rows in the recipe, as pair-data or eval-pair-data.",
)
_MEGATRON = "policy.megatron_cfg."
_OPTIMIZER, _SCHEDULER = f"{_MEGATRON}optimizer.", f"{_MEGATRON}scheduler."
_LORA = "policy.dtensor_cfg.lora_cfg."
_PRECISION = Choice(
    {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": "fp32 is the default"},
    "Take bfloat16, float16 or float32.",
)


def _megatrons(prefix: str, names: str) -> dict[str, Entry]:
    """Megatron's numbers and words under their own names."""
    return {f"{prefix}{name}": To(name.replace("_", "-")) for name in names.split()}


def _megatrons_switches(prefix: str, names: str) -> dict[str, Entry]:
    return {f"{prefix}{name}": Switch(name.replace("_", "-")) for name in names.split()}


_KEYS: dict[str, Entry] = {
    "defaults": Refused("Write out what it inherits: the keys of that file, changed by those of this one."),
    "dpo.max_num_epochs": To("pair-epochs", "number"),
    "dpo.max_num_steps": To("train-iters", "whole", off=("-1",), replaces=("dpo.max_num_epochs",)),
    "dpo.val_period": To("eval-interval", "whole", off=("0", "-1")),
    "dpo.val_at_start": Switch("eval-at-start"),
    "dpo.val_at_end": Unneeded("the last step is always evaluated"),
    "dpo.seed": To("seed", "whole"),
    "dpo.reference_policy_kl_penalty": LossOption("beta"),
    "dpo.preference_loss": Loss(
        {"ipo": Refused("Whatever it says, DPO is trained there. Take it out, or say preference-loss in the recipe.")},
        by_key={"dpo.preference_average_log_probs": {"true": {"dpo": "sigmoid_norm"}}},
    ),
    "dpo.preference_loss_weight": Refused("It is 1: scale --lr instead, and divide sft_loss_weight.", ("1", "1.0")),
    "dpo.preference_average_log_probs": Choice(
        {"true": "the loss is sigmoid_norm", "false": "log-ratios are sums over the answer"}, "Take true or false."
    ),
    "dpo.sft_loss_weight": LossOption("nll_weight", off=("0", "0.0")),
    "dpo.sft_average_log_probs": Choice(
        {"true": "--nll-weight weighs a mean per token"}, "--nll-weight weighs a mean per token: true."
    ),
    "dpo.gt_reward_scale": Refused("Losses that read rewards are not here. Take it out.", ("1", "1.0", "1.")),
    **unneeded(
        "evaluations are packed as the steps are, over all held-out pairs",
        "dpo.val_batches dpo.val_global_batch_size dpo.val_micro_batch_size",
    ),
    "checkpointing.enabled": Choice({"true": "--save says it", "false": "nothing is saved"}, ""),
    "checkpointing.checkpoint_dir": To("save", beside={"save-hf": "{}/hf"}),
    "checkpointing.save_period": To("save-interval", "whole"),
    **unneeded(
        "checkpoints are kept by their age: --keep-checkpoints",
        "checkpointing.keep_top_k checkpointing.metric_name checkpointing.higher_is_better",
    ),
    "checkpointing.checkpoint_must_save_by": Refused("SIGTERM and --stop-file save a checkpoint first. Take it out."),
    "policy.model_name": To("hf-model"),
    "policy.tokenizer.name": To("tokenizer-model", beside={"tokenizer-type": "HuggingFaceTokenizer"}),
    "policy.tokenizer.chat_template_kwargs": Refused("Say it: --chat-template-kwargs JSON."),
    "policy.tokenizer.chat_template_kwargs.*": Refused("Say it: --chat-template-kwargs JSON."),
    "policy.tokenizer.chat_template": Unneeded(shared.TEMPLATE),
    "policy.train_global_batch_size": To("pairs-per-step", "whole"),
    "policy.max_total_sequence_length": To("seq-length", "whole", times=shared.TWICE),
    "policy.precision": _PRECISION,
    "policy.max_grad_norm": To("clip-grad", "number"),
    **unneeded(
        shared.PACKED,
        "policy.train_micro_batch_size policy.logprob_batch_size policy.dynamic_batching.* policy.sequence_packing.* "
        "policy.make_sequence_length_divisible_by policy.offload_optimizer_for_logprob",
    ),
    # DTensor
    "policy.dtensor_cfg.enabled": Unneeded("Megatron trains"),
    "policy.dtensor_cfg.tensor_parallel_size": To("tensor-model-parallel-size", "whole"),
    "policy.dtensor_cfg.context_parallel_size": To("context-parallel-size", "whole"),
    "policy.dtensor_cfg.sequence_parallel": Switch("sequence-parallel"),
    "policy.dtensor_cfg.activation_checkpointing": shared.RECOMPUTE,
    "policy.dtensor_cfg.*": Unneeded("of DTensor alone"),
    f"{_LORA}enabled": Choice({"true": "--lora-rank says it", "false": "all weights are trained"}, ""),
    f"{_LORA}dim": To("lora-rank", "whole"),
    f"{_LORA}alpha": To("lora-alpha", "number"),
    f"{_LORA}dropout": To("lora-dropout", "number"),
    f"{_LORA}match_all_linear": Choice({"true": {"lora-targets": "all-linear"}, "false": "targets are named"}, ""),
    f"{_LORA}target_modules": shared.LORA_TARGETS,
    f"{_LORA}exclude_modules": Refused("Name what has adapters: target_modules."),
    f"{_LORA}*": Unneeded("adapters begin as PEFT's do"),
    "policy.optimizer.name": Choice({"torch.optim.AdamW": "Megatron's AdamW"}, "Take torch.optim.AdamW."),
    "policy.optimizer.kwargs.lr": To("lr", "number"),
    "policy.optimizer.kwargs.weight_decay": To("weight-decay", "number"),
    "policy.optimizer.kwargs.betas": Each(("adam-beta1", "adam-beta2")),
    "policy.optimizer.kwargs.eps": To("adam-eps", "number"),
    "policy.optimizer": Unneeded("of DTensor alone"),
    "policy.optimizer.kwargs.*": Unneeded("of torch's optimizer alone"),
    "policy.scheduler.*": Refused("Say it: --lr-decay-style, --lr-warmup-iters, --min-lr."),
    # Megatron
    f"{_MEGATRON}enabled": Unneeded("Megatron trains"),
    f"{_MEGATRON}activation_checkpointing": shared.RECOMPUTE,
    f"{_MEGATRON}freeze_moe_router": Switch("moe-freeze-router"),
    f"{_MEGATRON}num_layers_in_first_pipeline_stage": To("decoder-first-pipeline-num-layers", "whole"),
    f"{_MEGATRON}num_layers_in_last_pipeline_stage": To("decoder-last-pipeline-num-layers", "whole"),
    **_megatrons(
        _MEGATRON,
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size moe_router_dtype moe_router_load_balancing_type moe_router_bias_update_rate "
        "moe_token_dispatcher_type",
    ),
    **_megatrons_switches(
        _MEGATRON, "sequence_parallel moe_permute_fusion moe_enable_deepep moe_shared_expert_overlap"
    ),
    **unneeded(
        "Megatron's default is kept",
        f"{_MEGATRON}empty_unused_memory_level {_MEGATRON}pipeline_dtype {_MEGATRON}apply_rope_fusion "
        f"{_MEGATRON}bias_activation_fusion {_MEGATRON}defer_fp32_logits {_MEGATRON}moe_per_layer_logging "
        f"{_MEGATRON}env_vars {_MEGATRON}env_vars.* {_MEGATRON}converter_type {_MEGATRON}force_overwrite_initial_ckpt "
        f"{_MEGATRON}force_reconvert_from_hf {_MEGATRON}use_gloo_process_groups {_MEGATRON}attention_backend "
        f"{_MEGATRON}gradient_accumulation_fusion {_MEGATRON}use_fused_weighted_squared_relu "
        f"{_MEGATRON}cuda_graph_modules {_MEGATRON}cuda_graph_warmup_steps "
        f"{_OPTIMIZER}overlap_cpu_optimizer_d2h_h2d",
    ),
    **unneeded(
        "log-probs are fused with the output layer",
        f"{_MEGATRON}use_fused_linear_logprobs {_MEGATRON}fused_linear_logprobs_chunk_size",
    ),
    f"{_MEGATRON}cuda_graph_impl": Refused("Every pack has another attention plan: none."),
    f"{_MEGATRON}recompute_granularity": To("recompute-granularity"),
    f"{_MEGATRON}recompute_modules": To("recompute-modules", "list"),
    f"{_MEGATRON}fine_grained_activation_offloading": Switch("fine-grained-activation-offloading"),
    f"{_MEGATRON}offload_modules": To("offload-modules", "list"),
    f"{_MEGATRON}checkpoint.async_save": Switch("async-save"),
    f"{_MEGATRON}checkpoint.*": Unneeded("Megatron's default is kept"),
    "checkpointing.save_optimizer": Choice({"true": "checkpoints hold what a resumed run needs"}, "Take true."),
    f"{_OPTIMIZER}optimizer": Choice({"adam": "Megatron's AdamW"}, "Take adam."),
    f"{_OPTIMIZER}clip_grad": To("clip-grad", "number"),
    **_megatrons(_OPTIMIZER, "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps optimizer_offload_fraction"),
    **_megatrons_switches(
        _OPTIMIZER,
        "bf16 fp16 use_distributed_optimizer use_precision_aware_optimizer optimizer_cpu_offload",
    ),
    f"{_OPTIMIZER}params_dtype": Unneeded("the optimizer's weights are fp32"),
    f"{_OPTIMIZER}sgd_momentum": Unneeded("of SGD alone"),
    **_megatrons(
        _SCHEDULER,
        "start_weight_decay end_weight_decay weight_decay_incr_style lr_decay_style lr_warmup_iters lr_warmup_init "
        "lr_decay_iters",
    ),
    **_megatrons_switches(f"{_MEGATRON}distributed_data_parallel_config.", "overlap_grad_reduce overlap_param_gather"),
    f"{_MEGATRON}distributed_data_parallel_config.*": Unneeded(shared.SHARDING),
    f"{_MEGATRON}fp8_cfg.enabled": Choice({"true": "fp8 says which", "false": "no FP8"}, ""),
    f"{_MEGATRON}fp8_cfg.fp8": To("fp8-format"),
    f"{_MEGATRON}fp8_cfg.fp8_recipe": To("fp8-recipe"),
    f"{_MEGATRON}fp8_cfg.fp8_param": Switch("fp8-param-gather"),
    **refused("Say it in the recipe, with lora-rank.", f"{_MEGATRON}peft.enabled"),
    f"{_MEGATRON}peft.*": Unneeded("counts with peft.enabled"),
    # Data and the rest
    "data.train.data_path": To("pair-data", "list"),
    "data.train.dataset_name": _BUILT_IN,
    "data.validation.data_path": To("eval-pair-data", "list"),
    "data.validation.dataset_name": _BUILT_IN,
    "data.train.split": Unneeded("a file has one; write it behind a hub's name: NAME:SPLIT"),
    "data.validation.split": Unneeded("a file has one; write it behind a hub's name: NAME:SPLIT"),
    "data.max_input_seq_length": Unneeded("--seq-length says what fits"),
    "data.shuffle": Choice({"true": "pairs are shuffled"}, "Pairs are shuffled. Take true."),
    "data.num_workers": Unneeded(shared.LOADING),
    "data.validation": Unneeded("no pairs are held out"),
    "policy.hf_config_overrides.router_aux_loss_coef": To("moe-aux-loss-coeff", "number", off=("0", "0.0")),
    "policy.hf_config_overrides.*": Refused("Change the model's config.json."),
    "data.default.dataset_name": _BUILT_IN,
    "logger.*": Unneeded(shared.LOGGING),
    "cluster.*": Unneeded("torchrun or SLURM says how many ranks there are"),
    "policy.env_vars.*": Unneeded("set them for the job"),
    "policy.hf_config_overrides": Refused("Change the model's config.json."),
}

NEMO_RL = Source(
    name="nemo-rl",
    title="NeMo-RL",
    keys=_KEYS,
    defaults={
        "dpo.preference_loss": Default("dpo"),
        "dpo.reference_policy_kl_penalty": Default("0.05"),
        "dpo.max_num_steps": Default("150"),
    },
    gates=(
        Gate("dpo.sft_loss_weight", ("*",), ("dpo.sft_average_log_probs",), default="0"),
        Gate("checkpointing.enabled", ("true",), ("checkpointing.checkpoint_dir", "checkpointing.save_period")),
        Gate(
            f"{_LORA}enabled",
            ("true",),
            (
                f"{_LORA}dim",
                f"{_LORA}alpha",
                f"{_LORA}dropout",
                f"{_LORA}target_modules",
                f"{_LORA}match_all_linear",
                f"{_LORA}exclude_modules",
            ),
        ),
        Gate(
            f"{_MEGATRON}fp8_cfg.enabled",
            ("true",),
            (f"{_MEGATRON}fp8_cfg.fp8", f"{_MEGATRON}fp8_cfg.fp8_recipe", f"{_MEGATRON}fp8_cfg.fp8_param"),
        ),
        Gate("policy.megatron_cfg.enabled", ("true",), ("policy.megatron_cfg.*",)),
        Gate(
            "policy.dtensor_cfg.enabled",
            ("true",),
            ("policy.dtensor_cfg.*", "policy.optimizer.*", "policy.scheduler.*"),
        ),
    ),
    program=r"\S*\brun_dpo\.py",
)

#: ``rm.yaml``: what is ``dpo.*`` there is ``rm.*`` here.
NEMO_RL_RM = replace(
    NEMO_RL,
    name="nemo-rl-rm",
    variant_of="nemo-rl",
    title="NeMo-RL's reward model",
    keys={
        key.replace("dpo.", "rm.", 1): entry
        for key, entry in _KEYS.items()
        if not isinstance(entry, Loss | LossOption) and "average_log_probs" not in key
    }
    | {
        "policy.reward_model_cfg.enabled": Choice({"true": "a reward model is trained"}, "Take true."),
        "policy.reward_model_cfg.reward_model_type": Choice({"bradley_terry": "its loss"}, "Take bradley_terry."),
        "policy.activation_checkpointing_enabled": shared.RECOMPUTE,
    },
    defaults={},
    gates=NEMO_RL.gates[1:],
    always={"objective": "reward"},
    program=r"\S*\brun_rm\.py",
)
