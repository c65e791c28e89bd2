"""TRL's command lines and YAML files: ``trl dpo``, ``trl kto``, ``trl reward``, its CPO and ORPO trainers (1.16), and
its BCO trainer (before 1.16, which has none)."""

from __future__ import annotations

from dataclasses import replace

from megatron_bdpo.migrate.entries import (
    Choice,
    Default,
    Entry,
    Gate,
    Joined,
    Loss,
    LossOption,
    Refused,
    Source,
    To,
    Unneeded,
    Weights,
    unneeded,
)
from megatron_bdpo.migrate.tables import transformers as shared

_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")

_KEYS: dict[str, Entry] = {
    **shared.TRAINING,
    **shared.PEFT,
    # ModelConfig
    "model_name_or_path": To("hf-model"),
    "model_revision": To("hf-revision", off=("main",)),
    "dtype": Choice(
        {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": "--bf16 says it", "auto": "--bf16 says it"},
        "Take bfloat16, float16 or float32.",
    ),
    "attn_implementation": Unneeded(shared.ATTENTION),
    "use_peft": Choice({"true": "--lora-rank says it", "false": "all weights are trained"}, ""),
    "lora_r": To("lora-rank", "whole"),
    "lora_target_modules": shared.LORA_TARGETS,
    "lora_modules_to_save": Refused("Beside adapters all of the model is frozen. Take it out."),
    "lora_target_parameters": Refused("Adapters are beside linear layers. Take it out."),
    "lora_task_type": Unneeded("a preference run has one"),
    "load_in_8bit": shared.NO_QUANTIZATION,
    "load_in_4bit": shared.NO_QUANTIZATION,
    **unneeded("counts with load_in_4bit only", "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"),
    # ScriptArguments, DatasetMixtureConfig
    "dataset_name": To("pair-data"),
    "dataset_config": Refused("Configurations of a data set cannot be named: download it, and give its files."),
    "dataset_train_split": Refused(
        "Write it behind the name in the recipe, as in `pair-data: org/name:SPLIT`.", ("train",)
    ),
    "dataset_test_split": Joined("eval-pair-data", "{dataset_name}:{dataset_test_split}"),
    "datasets.path": To("pair-data", "list"),
    "datasets.*": Refused("Give --pair-data sources: [WEIGHT] NAME:SPLIT."),
    "test_split_size": To("eval-share", "number"),
    "dataset_streaming": Unneeded("tokens are kept in files and memory-mapped"),
    "ignore_bias_buffers": Unneeded("Megatron has its own data parallelism"),
    "streaming": Unneeded("tokens are kept in files and memory-mapped"),
    # DPOConfig
    "loss_type": Loss({"sigmoid": "dpo"}, weights="loss_weights", notes={"sft": f"sft is {shared.OF_THE_BATCH}"}),
    "loss_weights": Weights(),
    "beta": LossOption("beta"),
    "label_smoothing": LossOption("label_smoothing", off=("0", "0.0")),
    "rpo_alpha": LossOption("nll_weight", off=("0", "0.0"), note=shared.OF_THE_BATCH),
    "max_length": To("seq-length", "whole", times=shared.TWICE),
    "max_prompt_length": To("max-prompt-length", "whole"),
    "max_completion_length": To("max-response-length", "whole"),
    "truncation_mode": Unneeded("pairs that do not fit --seq-length are an error, or dropped: --long-pairs"),
    "precompute_ref_log_probs": Choice(
        {"true": {"reference": "precomputed"}, "false": {"reference": "resident"}}, "Take true or false."
    ),
    "precompute_ref_batch_size": Unneeded(shared.REFERENCE_BATCH),
    "disable_dropout": Choice(
        {"true": "there is no dropout"}, "Without it policy and reference would differ at first."
    ),
    **unneeded(shared.PACKED, "padding_free pad_to_multiple_of pad_token padding_value label_pad_token_id"),
    **shared.MODIFIERS,
    "sync_ref_model": Choice(
        {"true": {"reference": "resident"}, "false": "the reference stays"}, "Take true or false."
    ),
    "ref_model_sync_steps": To("sync-reference-every", "whole"),
    "ref_model_mixup_alpha": To("sync-reference-mix", "number"),
    "discopop_tau": LossOption("discopop_tau", off=("0.05",)),
    **unneeded("models here have a decoder alone", "is_encoder_decoder"),
    "generate_during_eval": Refused("Take it out; --eval-prompts FILE has answers at every evaluation."),
    "ld_alpha": LossOption("ld_alpha", off=("none", "null", "1", "1.0")),
    "ref_model_name_or_path": To("reference-model"),
}

_DEFAULTS = {
    **shared.DEFAULTS,
    "learning_rate": Default("1e-6"),
    "bf16": Default("true", unless=("fp16",)),
    "max_length": Default("1024"),
    "loss_type": Default("sigmoid"),
    "beta": Default("0.1"),
    "dataset_test_split": Default("test"),
    "eval_steps": Default("10", same_as="logging_steps"),
    "lora_r": Default("16"),
    "lora_alpha": Default("32"),
    "lora_dropout": Default("0.05"),
    "ref_model_sync_steps": Default("512"),
    "ref_model_mixup_alpha": Default("0.6"),
}

TRL = Source(
    name="trl",
    title="TRL",
    keys=_KEYS,
    defaults=_DEFAULTS,
    gates=(
        *shared.GATES,
        Gate("eval_strategy", ("steps", "epoch"), ("dataset_test_split",), default="no"),
        Gate("use_peft", ("true",), _LORA),
        shared.ALPHA_DIVERGENCE,
        Gate("sync_ref_model", ("true",), ("ref_model_sync_steps", "ref_model_mixup_alpha")),
    ),
    program=r"trl dpo|\S*\bdpo\.py",
)

TRL_REWARD = replace(
    TRL,
    name="trl-reward",
    variant_of="trl",
    title="TRL's RewardTrainer",
    keys={
        **{key: entry for key, entry in _KEYS.items() if not isinstance(entry, Loss | LossOption | Weights)},
        "center_rewards_coefficient": To("center-rewards-coefficient", "number", off=("0", "0.0")),
        "chat_template_path": Refused("Templates are the tokenizer's: put it into the model's directory."),
        "eos_token": Unneeded("the tokenizer's files say it"),
    },
    defaults={key: value for key, value in _DEFAULTS.items() if key not in ("loss_type", "beta")}
    | {"learning_rate": Default("1e-4")},
    gates=tuple(gate for gate in TRL.gates if gate is not shared.ALPHA_DIVERGENCE),
    always={"objective": "reward"},
    program=r"trl reward|\S*\breward(?:_modeling)?\.py",
)

TRL_KTO = replace(
    TRL,
    name="trl-kto",
    variant_of="trl",
    title="TRL's KTOTrainer",
    keys={**_KEYS, "loss_type": Loss({}), **shared.WEIGHTS_OF_LABELS},
    defaults={**_DEFAULTS, "loss_type": Default("kto")},
    program=r"trl kto|\S*\bkto\.py",
)

_NO_UDM = "Undesirable answers are not weighed by a classifier of their prompts here. Take it out."

TRL_BCO = replace(
    TRL,
    name="trl-bco",
    variant_of="trl",
    title="TRL's BCOTrainer",
    keys={
        **_KEYS,
        "loss_type": Loss({}),
        "prompt_sample_size": Refused(_NO_UDM, ("1024",)),
        "min_density_ratio": Refused(_NO_UDM, ("0.5",)),
        "max_density_ratio": Refused(_NO_UDM, ("10", "10.0")),
    },
    defaults={**_DEFAULTS, "loss_type": Default("bco"), "learning_rate": Default("5e-5")},
    program=r"\S*\bbco\.py",
)

TRL_CPO = replace(
    TRL,
    name="trl-cpo",
    variant_of="trl",
    title="TRL's CPOTrainer",
    keys={
        **TRL.keys,
        "loss_type": Loss(
            {**shared.LOSSES_OF_CPO, "alphapo": "simpo"},
            by_key={"alpha": {"*": {"simpo": "alphapo", "alphapo": "alphapo"}}},
        ),
        "cpo_alpha": LossOption("nll_weight", note=shared.OF_THE_BATCH),
        "simpo_gamma": LossOption("simpo_gamma"),
        "alpha": LossOption("alphapo_alpha", off=("0", "0.0")),
    },
    defaults={**_DEFAULTS, "cpo_alpha": Default("1.0")},
    gates=(*TRL.gates, Gate("loss_type", ("sigmoid", "simpo"), ("cpo_alpha",), default="sigmoid")),  # alphapo has none
    program=r"trl cpo|\S*\bcpo\.py",
)

TRL_ORPO = replace(
    TRL,
    name="trl-orpo",
    variant_of="trl",
    title="TRL's ORPOTrainer",
    keys={
        **TRL.keys,
        "loss_type": Loss({}, notes={"orpo": shared.WITH_THE_PROMPT}),
        "beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    },
    defaults={**_DEFAULTS, "loss_type": Default("orpo")},
    program=r"trl orpo|\S*\borpo\.py",
)
