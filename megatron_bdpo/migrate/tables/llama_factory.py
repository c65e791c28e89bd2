"""LLaMA-Factory: ``llamafactory-cli train FILE`` with ``stage: dpo``."""

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
    "stage": Choice({"dpo": "the program trains on pairs"}, "This program trains on preference pairs: stage dpo."),
    "finetuning_type": Choice({"lora": "--lora-rank says it", "full": "all weights are trained"}, "Take lora or full."),
    "lora_rank": To("lora-rank", "whole"),
    "lora_target": shared.LORA_TARGETS,
    "adapter_name_or_path": To("lora-start"),
    "pref_beta": LossOption("beta", by_loss={"orpo": "orpo_weight"}),
    "pref_ftx": LossOption("nll_weight", off=("0", "0.0")),
    "pref_loss": Loss({"sigmoid": "dpo"}),
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
    **unneeded("other losses have it", "kto_chosen_weight kto_rejected_weight"),
    **refused(
        "Take it out.",
        "pref_bco_weight ld_alpha loraplus_lr_ratio pissa_init use_galore use_apollo use_badam use_llama_pro "
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
