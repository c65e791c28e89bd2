"""OpenRLHF: command lines of ``openrlhf.cli.train_dpo`` and ``train_rm``, and of ``train_kto``, which 0.10 dropped."""

from __future__ import annotations

from dataclasses import replace

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Each,
    Entry,
    Gate,
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

_KEYS: dict[str, Entry] = {
    "pretrain": To("hf-model"),
    "ref_pretrain": To("reference-model"),
    "ipo": Choice(
        {
            "true": {"preference-loss": "ipo", "ipo-length-normalized": False},  # of sums
            "false": {"preference-loss": "dpo"},
        },
        "Take true or false.",
    ),
    "beta": LossOption("beta"),
    "label_smoothing": LossOption("label_smoothing", off=("0", "0.0")),
    "nll_loss_coef": LossOption("nll_weight", off=("0", "0.0")),
    "aux_loss_coef": To("moe-aux-loss-coeff", "number", off=("0", "0.0")),
    "dataset": To("pair-data", "list", without={",": "Give the sources in the recipe: pair-data: [0.5, A, 0.5, B]."}),
    "dataset_probs": Refused("Give weights in the recipe: pair-data: [0.5, A, 0.5, B].", ("1", "1.0")),
    "train_split": Refused("Write it behind the name in the recipe: pair-data: NAME:SPLIT.", ("train",)),
    "eval_dataset": To("eval-pair-data", "list"),
    "eval_split": Unneeded("--eval-pair-data NAME:SPLIT says it, or --eval-share"),
    "prompt_key": Refused("Say it: --pair-columns prompt=NAME.", ("prompt",)),
    "chosen_key": Refused("Say it: --pair-columns chosen=NAME.", ("chosen",)),
    "rejected_key": Refused("Say it: --pair-columns rejected=NAME.", ("rejected",)),
    "input_template": Refused("Rows of text are joined as they are: put it into them, or take messages."),
    "apply_chat_template": Choice({"true": "messages go through the tokenizer's template"}, "Take messages."),
    "tokenizer_chat_template": Unneeded(shared.TEMPLATE),
    "max_samples": To("max-pairs", "whole"),
    "max_len": To("seq-length", "whole", times=shared.TWICE),
    "train_batch_size": To("pairs-per-step", "whole"),
    "micro_train_batch_size": Unneeded(shared.PACKED),
    "packing_samples": Unneeded(shared.PACKED),
    "max_epochs": To("pair-epochs", "number"),
    "learning_rate": To("lr", "number", shares={"min-lr": 0.1}),
    "lr_scheduler": Choice({"cosine_with_min_lr": {"lr-decay-style": "cosine"}}, "Say --lr-decay-style and --min-lr."),
    "lr_warmup_ratio": To("lr-warmup-fraction", "number", off=("0", "0.0")),
    "l2": To("weight-decay", "number"),
    "adam_betas": Each(("adam-beta1", "adam-beta2")),
    "max_norm": To("clip-grad", "number"),
    "seed": To("seed", "whole"),
    "full_determinism": Switch("deterministic-mode"),
    "bf16": Switch("bf16"),
    "param_dtype": Choice(
        {"bf16": {"bf16": True}, "fp16": {"fp16": True}, "fp32": "fp32 is the default"}, "Take bf16, fp16 or fp32."
    ),
    "gradient_checkpointing": shared.RECOMPUTE,
    "lora_rank": To("lora-rank", "whole", off=("0",)),
    "lora_alpha": To("lora-alpha", "number"),
    "lora_dropout": To("lora-dropout", "number"),
    "target_modules": shared.LORA_TARGETS,
    "load_in_4bit": shared.NO_QUANTIZATION,
    "ring_attn_size": To("context-parallel-size", "whole"),
    "ds_tensor_parallel_size": To("tensor-model-parallel-size", "whole"),
    "save_path": To("save-hf"),
    "save_steps": To("save-interval", "whole", off=("-1",)),
    "max_ckpt_num": To("keep-checkpoints", "whole"),
    "logging_steps": To("log-interval", "whole"),
    "eval_steps": To("eval-interval", "whole", off=("-1",)),
    "load_checkpoint": Unneeded("a start with the same --save goes on from what is there"),
    "ckpt_path": To("save"),
    **unneeded(
        "--keep-checkpoints says how many stay", "max_ckpt_mem save_hf_ckpt disable_ds_ckpt use_ds_universal_ckpt"
    ),
    **unneeded(
        shared.SHARDING,
        "zero_stage zpg adam_offload grad_accum_dtype overlap_comm ref_offload deepcompile disable_trace_cache",
    ),
    **unneeded(shared.ATTENTION, "flash_attn attn_implementation ring_head_stride"),
    **unneeded(shared.LOGGING, "use_wandb wandb_org wandb_group wandb_project wandb_run_name use_tensorboard"),
    **unneeded("log-probs are fused with the output layer", "use_liger_kernel"),
    **unneeded("Megatron has its own way", "local_rank gradient_checkpointing_use_reentrant disable_fast_tokenizer"),
    **refused("Names are those of the Hugging Face hub. Take it out.", "use_ms"),
}

#: The names of 0.11, in groups -> those of before.
_NAMES = {
    "ckpt": "output_dir=save_path save_steps save_hf=save_hf_ckpt disable_ds=disable_ds_ckpt path=ckpt_path "
    "max_num=max_ckpt_num max_mem=max_ckpt_mem load_enable=load_checkpoint",
    "logger": "logging_steps wandb.key=use_wandb wandb.org=wandb_org wandb.group=wandb_group "
    "wandb.project=wandb_project wandb.run_name=wandb_run_name tensorboard_dir=use_tensorboard",
    "eval": "steps=eval_steps dataset=eval_dataset split=eval_split",
    "train": "micro_batch_size=micro_train_batch_size batch_size=train_batch_size seed max_epochs "
    "full_determinism_enable=full_determinism",
    "model": "model_name_or_path=pretrain gradient_checkpointing_enable=gradient_checkpointing beta ipo_enable=ipo "
    "gradient_checkpointing_reentrant=gradient_checkpointing_use_reentrant label_smoothing aux_loss_coef nll_loss_coef",
    "ref": "model_name_or_path=ref_pretrain offload=ref_offload",
    "adam": "lr=learning_rate betas=adam_betas weight_decay=l2",
    "data": "dataset dataset_probs dataset_split=train_split max_samples prompt_key chosen_key rejected_key "
    "input_template apply_chat_template tokenizer_chat_template max_len disable_fast_tokenizer",
    "ds": "zero_stage param_dtype zpg adam_offload attn_implementation use_liger_kernel grad_accum_dtype overlap_comm "
    "tensor_parallel_size=ds_tensor_parallel_size ring_attn_size ring_attn_head_stride=ring_head_stride load_in_4bit "
    "packing_samples deepcompile use_universal_ckpt=use_ds_universal_ckpt lora.rank=lora_rank lora.alpha=lora_alpha "
    "lora.target_modules=target_modules lora.dropout=lora_dropout",
}
_BEFORE = {
    f"{group}.{name}": before or name
    for group, names in _NAMES.items()
    for name, _, before in (each.partition("=") for each in names.split())
}
_SINCE = {before: name for name, before in _BEFORE.items()}

_NEW: dict[str, Entry] = {
    **{name: _KEYS[before] for name, before in _BEFORE.items()},
    "optim": Choice({"adam": "Megatron's AdamW"}, "Take adam."),
    "adam.eps": To("adam-eps", "number"),
    "min_lr_ratio": Refused("Say --min-lr in the recipe: a tenth of --lr is written.", ("0.1",)),
    "data.dataloader_num_workers": Unneeded(shared.LOADING),
    "ds.experts_implementation": Unneeded("Megatron has its own experts"),
    **unneeded("counts with optim: muon only", "muon.lr muon.momentum muon.ns_steps muon.nesterov muon.no_nesterov"),
}


def _default(key: str, value: str) -> tuple[str, Default]:
    """Of a key with two names: under the older one."""
    return key, Default(value, unless=(_SINCE[key],) if key in _SINCE else ())


OPENRLHF = Source(
    name="openrlhf",
    title="OpenRLHF",
    keys={**_KEYS, **_NEW},
    defaults=dict(
        _default(key, value)
        for key, value in {
            "ipo": "false",
            "beta": "0.1",
            "learning_rate": "1e-5",
            "lr_scheduler": "cosine_with_min_lr",
            "lr_warmup_ratio": "0.03",
            "l2": "0.0",
            "max_norm": "1.0",
            "max_epochs": "1",
            "train_batch_size": "128",
            "max_len": "512",
            "seed": "42",
        }.items()
    ),
    gates=(
        Gate("lora_rank", ("*",), ("lora_alpha", "lora_dropout", "target_modules"), default="0"),
        Gate("ds.lora.rank", ("*",), ("ds.lora.alpha", "ds.lora.dropout", "ds.lora.target_modules"), default="0"),
    ),
    program=r"openrlhf\.cli\.train_dpo|\S*\btrain_dpo\.py",
)

_NOT_OF_REWARDS = {"ipo", "beta", "label_smoothing", "nll_loss_coef", "ref_pretrain", "ref_offload"}

OPENRLHF_RM = replace(
    OPENRLHF,
    name="openrlhf-rm",
    variant_of="openrlhf",
    title="OpenRLHF's reward model",
    keys={key: entry for key, entry in OPENRLHF.keys.items() if _BEFORE.get(key, key) not in _NOT_OF_REWARDS}
    | {
        "model.loss_type": Choice({"sigmoid": "its loss"}, "A reward model's loss is Bradley-Terry: sigmoid."),
        "model.margin_loss_enable": Unneeded("margins of rows are read"),
        "model.compute_fp32_loss_enable": Unneeded("losses are computed in fp64"),
        "ds.value_head_prefix": Unneeded("--save-hf writes transformers' names"),
        "loss": Choice({"sigmoid": "its loss"}, "A reward model's loss is Bradley-Terry: sigmoid."),
        "value_head_prefix": Unneeded("--save-hf writes transformers' names"),
        "compute_fp32_loss": Unneeded("losses are computed in fp64"),
        "margin_loss": Unneeded("margins of rows are read"),
    },
    defaults={key: value for key, value in OPENRLHF.defaults.items() if key not in _NOT_OF_REWARDS}
    | {"learning_rate": Default("9e-6", unless=("adam.lr",))},
    always={"objective": "reward"},
    program=r"openrlhf\.cli\.train_rm|\S*\btrain_rm\.py",
)

_NOT_OF_KTO = {"ipo", "label_smoothing", "nll_loss_coef", "ref_pretrain", "prompt_key", "chosen_key", "rejected_key"}

OPENRLHF_KTO = replace(
    OPENRLHF,
    name="openrlhf-kto",
    variant_of="openrlhf",
    title="OpenRLHF's KTO",
    keys={key: entry for key, entry in _KEYS.items() if key not in _NOT_OF_KTO}
    | {
        "dataset_split": _KEYS["train_split"],
        "desirable_loss_weight": LossOption("desirable_weight"),
        "undesirable_loss_weight": LossOption("undesirable_weight"),
        "input_key": Refused("Say it: --pair-columns prompt=NAME.", ("input",)),
        "output_key": Refused("Say it: --pair-columns completion=NAME.", ("output",)),
        "label_key": Refused("Say it: --pair-columns label=NAME.", ("label",)),
        "dist_backend": Unneeded(shared.SHARDING),
    },
    defaults={key: value for key, value in OPENRLHF.defaults.items() if key not in _NOT_OF_KTO}
    | {"beta": Default("0.01"), "max_len": Default("2048")},
    gates=OPENRLHF.gates[:1],
    always={"preference-loss": "kto"},
    program=r"openrlhf\.cli\.train_kto|\S*\btrain_kto\.py",
)
