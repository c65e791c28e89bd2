"""Configurations of KTO and BCO become recipes: published runs, and what their keys count with."""

from __future__ import annotations

import pytest

from megatron_bdpo.cli.main import main
from tests.unit.migrate.test_migrate import check_recipe
from tests.unit.migrate.test_objectives import translated

TRL_KTO = """
trl kto \\
    --dataset_name trl-lib/kto-mix-14k \\
    --model_name_or_path Qwen/Qwen2.5-0.5B \\
    --per_device_train_batch_size 16 \\
    --num_train_epochs 1 \\
    --learning_rate 5e-7 \\
    --lr_scheduler_type cosine \\
    --gradient_accumulation_steps 1 \\
    --desirable_weight 1.33 \\
    --output_dir kto-aligned-model
"""

TRL_BCO = """
python trl/experimental/bco/bco.py \\
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback-gpt-3.5-turbo-helpfulness \\
    --per_device_train_batch_size 16 \\
    --num_train_epochs 1 \\
    --gradient_accumulation_steps 1 \\
    --output_dir bco-aligned-model \\
    --max_length 2048 \\
    --max_completion_length 1024 \\
    --warmup_steps 0.1
"""

SWIFT_KTO = """
megatron rlhf \\
    --rlhf_type kto \\
    --model Qwen/Qwen2.5-7B-Instruct \\
    --dataset org/labelled \\
    --split_dataset_ratio 0.01 \\
    --tensor_model_parallel_size 4 \\
    --micro_batch_size 1 \\
    --global_batch_size 4 \\
    --num_train_epochs 1 \\
    --lr 1e-5 \\
    --output_dir megatron_output \\
    --max_length 8192 \\
    --beta 0.2 \\
    --desirable_weight 1 \\
    --undesirable_weight 0.5
"""

LLAMA_FACTORY_KTO = """
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
stage: kto
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
kto_rejected_weight: 0.5
dataset: kto_en_demo
template: qwen3_nothink
cutoff_len: 2048
output_dir: saves/kto
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
bf16: true
"""

AXOLOTL_KTO = """
base_model: meta-llama/Llama-3.2-1B
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.2
datasets:
  - path: argilla/ultrafeedback-binarized-preferences-cleaned-kto
    type: llama3.ultra
    split: train
remove_unused_columns: false
output_dir: ./outputs/out
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 1
num_epochs: 1
optimizer: adamw_torch
learning_rate: 0.00002
"""

OPENRLHF_KTO = """
deepspeed --module openrlhf.cli.train_kto \\
   --save_path ./checkpoint/llama3-8b-kto \\
   --save_steps -1 \\
   --logging_steps 1 \\
   --eval_steps -1 \\
   --train_batch_size 256 \\
   --micro_train_batch_size 1 \\
   --pretrain OpenRLHF/Llama-3-8b-sft-mixture \\
   --bf16 \\
   --max_epochs 1 \\
   --max_len 8192 \\
   --zero_stage 3 \\
   --learning_rate 5e-7 \\
   --undesirable_loss_weight 0.5 \\
   --dataset org/labelled \\
   --input_key input \\
   --output_key output \\
   --label_key label \\
   --gradient_checkpointing
"""

#: Published runs on labelled answers: file ending, text, table, some of the flags, and all keys that are refused.
LABELLED: dict[str, tuple[str, str, str, dict[str, str], set[str]]] = {
    "TRL": (
        ".sh",
        TRL_KTO,
        "trl-kto",
        {"preference-loss": "kto", "beta": "0.1", "desirable-weight": "1.33", "pairs-per-step": "128"},
        set(),
    ),
    "TRL's BCO": (".sh", TRL_BCO, "trl-bco", {"preference-loss": "bco", "beta": "0.1", "lr": "5e-5"}, set()),
    "Megatron-SWIFT": (
        ".sh",
        SWIFT_KTO,
        "megatron-swift",
        {"preference-loss": "kto", "beta": "0.2", "desirable-weight": "1", "undesirable-weight": "0.5"},
        set(),
    ),
    "LLaMA-Factory": (
        ".yaml",
        LLAMA_FACTORY_KTO,
        "llama-factory",
        {"preference-loss": "kto", "beta": "0.2", "undesirable-weight": "0.5", "pairs-per-step": "64"},
        {"dataset"},
    ),
    "axolotl": (
        ".yml",
        AXOLOTL_KTO,
        "axolotl",
        {"preference-loss": "kto", "beta": "0.5", "desirable-weight": "0.2"},
        set(),
    ),
    "OpenRLHF": (
        ".sh",
        OPENRLHF_KTO,
        "openrlhf-kto",
        {"preference-loss": "kto", "beta": "0.01", "undesirable-weight": "0.5", "min-lr": "5e-08"},
        set(),
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_answers(ranks, name, tmp_path):
    """Published examples of KTO and BCO; the job's own parser takes what they come to."""
    ending, text, table, expected, refused = LABELLED[name]
    result = translated(tmp_path, ending, text, None if ending == ".sh" else table)
    assert result.source.name == table and set(result.refused) == refused, result.refused
    assert expected.items() <= result.settings.items(), result.settings
    recipe = tmp_path / "recipe.yaml"
    config = ["migrate", str(tmp_path / f"config{ending}"), "--from", table, "-o", str(recipe), "--processes", "8"]
    assert main([*config, *["--partial"] * bool(refused)]) == 0
    (flags,) = ranks(1)(check_recipe, str(recipe))
    assert {"preference-loss", *expected} <= set(flags)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ms-swift", "rlhf_type: dpo\ndesirable_weight: 2.0"),
        ("llama-factory", "stage: dpo\nkto_chosen_weight: 2.0"),
        ("axolotl", "rl: dpo\nkto_desirable_weight: 2.0"),
    ],
)
def test_weights_of_labels_count_with_kto_only(name, text, tmp_path):
    result = translated(tmp_path, ".yaml", text, name)
    assert not result.refused and "desirable-weight" not in result.settings
    key = text.splitlines()[1].partition(":")[0]
    assert result.unneeded[key].startswith("counts only with ") and result.unneeded[key].endswith(": kto")


def test_kto_without_its_drift_is_apo(tmp_path):
    for name in ("trl-kto", "ms-swift"):
        text = "loss_type: apo_zero_unpaired\ndesirable_weight: 2.0" + "\nrlhf_type: kto" * (name == "ms-swift")
        settings = translated(tmp_path, ".yaml", text, name).settings
        assert {"preference-loss": "apo_zero_unpaired", "desirable-weight": "2.0"}.items() <= settings.items()
