"""What configurations train: reward models, several losses, losses with modifiers."""

from __future__ import annotations

from dataclasses import fields

import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.migrate import reading, translation
from megatron_bdpo.migrate.tables import SOURCES
from tests.unit.migrate.test_migrate import BY_NAME, PROGRAMS, check_recipe

TRL_REWARD = """
trl reward --model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name org/preferences --output_dir reward \\
    --per_device_train_batch_size 8 --num_train_epochs 1 --gradient_checkpointing true --learning_rate 1.0e-5 \\
    --eval_strategy steps --eval_steps 50 --max_length 2048 --center_rewards_coefficient 0.01
"""

SWIFT_RM = """
megatron rlhf --rlhf_type rm --model Qwen/Qwen2.5-7B-Instruct --dataset org/preferences --save_safetensors true \\
    --tensor_model_parallel_size 2 --micro_batch_size 1 --global_batch_size 16 --max_epochs 1 --finetune true \\
    --lr 1e-5 --lr_warmup_fraction 0.05 --min_lr 1e-6 --output_dir output --max_length 8192 --beta 0.1 \\
    --center_rewards_coefficient 0.01
"""

LLAMA_FACTORY_RM = """
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
stage: rm
do_train: true
finetuning_type: full
template: qwen3_nothink
cutoff_len: 2048
output_dir: saves/reward
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""

AXOLOTL_RM = """
base_model: Skywork/Skywork-Reward-V2-Qwen3-8B
model_type: AutoModelForSequenceClassification
num_labels: 1
reward_model: true
center_rewards_coefficient: 0.01
chat_template: qwen3
datasets:
  - path: org/preferences
    type: bradley_terry.chat_template
sequence_len: 8192
output_dir: ./outputs/out
gradient_accumulation_steps: 4
micro_batch_size: 1
optimizer: adamw_torch
learning_rate: 0.00002
special_tokens:
"""

NEMO_RM = """
rm:
  max_num_epochs: 1
  max_num_steps: -1
  val_period: 16
  seed: 42
checkpointing:
  enabled: true
  checkpoint_dir: "results/rm"
  save_period: ${rm.val_period}
policy:
  model_name: "meta-llama/Llama-3.2-1B-Instruct"
  train_global_batch_size: 128
  max_total_sequence_length: 8192
  precision: "bfloat16"
  activation_checkpointing_enabled: false
  reward_model_cfg: {enabled: true, reward_model_type: "bradley_terry"}
data:
  train: {data_path: pairs.jsonl}
logger:
  wandb:
    name: "rm-dev-${data.train.data_path}"
"""

OPENRLHF_TRAIN = """
read -r -d '' training_commands <<EOF
openrlhf.cli.PROGRAM \\
   --ckpt.output_dir ./checkpoint/llama3-8b \\
   --ckpt.save_steps -1 \\
   --logger.logging_steps 1 \\
   --eval.steps -1 \\
   --train.batch_size 256 \\
   --train.micro_batch_size 1 \\
   --model.model_name_or_path OpenRLHF/Llama-3-8b-sft-mixture \\
   --ds.param_dtype bf16 \\
   --train.max_epochs 1 \\
   --data.max_len 8192 \\
   --ds.zero_stage 3 \\
   --adam.lr 4e-7 \\
   --data.dataset org/preferences \\
   --data.apply_chat_template \\
   --data.chosen_key chosen \\
   --ds.attn_implementation flash_attention_2 \\
   --ckpt.load_enable \\
   --ds.packing_samples \\
   --model.gradient_checkpointing_enable
EOF
"""

OPENRLHF_RM = OPENRLHF_TRAIN.replace("PROGRAM", "train_rm")
OPENRLHF_DPO = OPENRLHF_TRAIN.replace("PROGRAM", "train_dpo --model.beta 0.2 --adam.betas 0.9 0.98")

#: Trainers' published reward models: file ending, text, table, some of the flags.
REWARD_MODELS = {
    "TRL": (".sh", TRL_REWARD, "trl-reward", {"lr": "1.0e-5", "center-rewards-coefficient": "0.01"}),
    "Megatron-SWIFT": (
        ".sh",
        SWIFT_RM,
        "megatron-swift",
        {"pairs-per-step": "16", "center-rewards-coefficient": "0.01"},
    ),
    "LLaMA-Factory": (".yaml", LLAMA_FACTORY_RM, "llama-factory", {"pairs-per-step": "64", "seq-length": "4096"}),
    "axolotl": (".yml", AXOLOTL_RM, "axolotl", {"center-rewards-coefficient": "0.01", "pair-data": "org/preferences"}),
    "NeMo-RL": (".yaml", NEMO_RM, "nemo-rl-rm", {"pair-epochs": "1", "eval-interval": "16", "save-interval": "16"}),
    "OpenRLHF": (".sh", OPENRLHF_RM, "openrlhf-rm", {"lr": "4e-7", "min-lr": "4e-08", "pairs-per-step": "256"}),
}


def translated(directory, ending: str, text: str, name: str | None = None) -> translation.Translation:
    path = directory / f"config{ending}"
    path.write_text(text)
    found, program = reading.read(path, PROGRAMS)
    known = name or program
    source = BY_NAME[known] if known else translation.recognise(found, SOURCES)
    result = translation.translate(found, source, 8)
    told = " ".join([*result.unneeded, *result.refused, ", ".join(result.origins.values())])
    assert [key for key in found if key not in told] == [], "dropped"
    return result


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_reward_models(ranks, name, tmp_path):
    """A recipe of them is of one: no loss, no reference; and the job's own parser takes it."""
    ending, text, table, expected = REWARD_MODELS[name]
    result = translated(tmp_path, ending, text)
    assert result.source.name == table and not result.refused, result.refused
    assert (expected | {"objective": "reward"}).items() <= result.settings.items()
    assert not result.settings.keys() & {"preference-loss", "beta", "nll-weight", "reference", "reference-model"}
    recipe = tmp_path / "recipe.yaml"
    assert main(["migrate", str(tmp_path / f"config{ending}"), "-o", str(recipe), "--processes", "8"]) == 0
    (flags,) = ranks(1)(check_recipe, str(recipe))
    assert "objective" in flags


def test_adapters_of_a_reward_model_are_refused(tmp_path):
    text = LLAMA_FACTORY_RM.replace("finetuning_type: full", "finetuning_type: lora\nlora_rank: 8\nlora_target: all")
    result = translated(tmp_path, ".yaml", text)
    assert set(result.refused) == {"lora_rank", "lora_target"}
    assert "line 6, lora_rank: --lora-rank is not for reward models" in result.refused["lora_rank"]
    assert not any(flag.startswith("lora") for flag in result.settings)


def test_adapters_of_a_reward_model_are_refused_where_only_a_default_has_their_rank(tmp_path):
    result = translated(tmp_path, ".sh", TRL_REWARD.replace("trl reward", "trl reward --use_peft true"))
    (why,) = result.refused.values()
    assert why.startswith("TRL's RewardTrainer's default of lora_r: --lora-rank is not for reward models")
    several = AXOLOTL_RM + "adapter: lora\nlora_r: 8\nlora_target_linear: true\nlora_target_modules: all\n"
    assert {"lora_r", "lora_target_linear", "lora_target_modules"} <= translated(
        tmp_path, ".yml", several
    ).refused.keys()


def test_todays_names_of_openrlhf(tmp_path):
    """They are in groups, with points."""
    result = translated(tmp_path, ".sh", OPENRLHF_DPO)
    assert result.source.name == "openrlhf" and not result.refused
    expected = {
        "hf-model": "OpenRLHF/Llama-3-8b-sft-mixture",
        "preference-loss": "dpo",
        "beta": "0.2",
        "lr": "4e-7",
        "adam-beta2": "0.98",
        "weight-decay": "0.0",  # its default, of either name
        "pairs-per-step": "256",
        "bf16": True,
    }
    assert expected.items() <= result.settings.items()
    ipo = translated(tmp_path, ".sh", OPENRLHF_DPO.replace("--model.beta", "--model.ipo_enable --model.beta"))
    assert {"preference-loss": "ipo", "ipo-length-normalized": False}.items() <= ipo.settings.items()
    assert not ipo.refused  # theirs is of sums


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("trl", "f_divergence_type: js_divergence", {"preference-loss": "dpo", "f-divergence": "js_divergence"}),
        (
            "trl",
            "f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.3",
            {"f-divergence": "alpha_divergence", "f-alpha-divergence-coef": "0.3"},
        ),
        (
            "trl",
            "use_weighting: true\nloss_type: [ipo, sft]",
            {"use-weighting": True, "preference-loss": "ipo=1,sft=1"},
        ),
        ("trl", "reference_free: true", {"reference-free": True}),
        ("trl", "ld_alpha: 0.25", {"ld-alpha": "0.25"}),
        ("megatron-swift", "rlhf_type: dpo\nf_divergence_type: js_divergence", {"f-divergence": "js_divergence"}),
        (
            "ms-swift",
            "rlhf_type: simpo\nsimpo_gamma: 1.0",
            {"preference-loss": "simpo", "simpo-gamma": "1.0", "beta": "2.0"},
        ),
        ("ms-swift", "rlhf_type: orpo\nbeta: 0.2", {"preference-loss": "orpo", "orpo-weight": "0.2"}),
        ("ms-swift", "rlhf_type: cpo\ncpo_alpha: 0.5", {"preference-loss": "cpo", "nll-weight": "0.5"}),
        ("ms-swift", "rlhf_type: cpo\nloss_type: simpo\nsimpo_gamma: 1", {"preference-loss": "simpo", "beta": "0.1"}),
        (
            "ms-swift",
            "rlhf_type: dpo\nloss_type: [sigmoid, nca_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]",
            {"preference-loss": "dpo=0.8,nca_pair=0.2,sft=1.0"},
        ),
        (
            "axolotl",  # whose trainer is TRL's, with its defaults
            "rl: simpo\nsimpo_gamma: 0.5",
            {"preference-loss": "simpo", "beta": "0.1", "nll-weight": "1.0"},
        ),
        ("axolotl", "rl: dpo\ndpo_loss_type: [sigmoid_norm]", {"preference-loss": "sigmoid_norm", "beta": "0.1"}),
        ("axolotl", "rl: dpo\ndpo_norm_loss: true", {"preference-loss": "sigmoid_norm", "beta": "0.1"}),
        ("nemo-rl", "dpo.seed: 1", {"preference-loss": "dpo", "beta": "0.05", "train-iters": "150"}),
        (
            "nemo-rl",
            "dpo.preference_average_log_probs: true\ndpo.reference_policy_kl_penalty: 5",
            {"preference-loss": "sigmoid_norm", "beta": "5"},
        ),
        (
            "trl-cpo",
            "loss_type: alphapo\nalpha: 0.25\nbeta: 2.5\nsimpo_gamma: 0.1",
            {"preference-loss": "alphapo", "alphapo-alpha": "0.25", "beta": "2.5", "simpo-gamma": "0.1"},
        ),
        ("trl-cpo", "loss_type: simpo\nalpha: 0.25", {"preference-loss": "alphapo", "nll-weight": "1.0"}),
        ("trl-cpo", "loss_type: alphapo", {"preference-loss": "simpo"}),
        (
            "axolotl",
            "rl: dpo\ndpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1, 0.5]\ndpo_use_weighting: true",
            {"preference-loss": "dpo=1,sft=0.5", "use-weighting": True},
        ),
    ],
    ids=[
        *("divergence", "alpha divergence", "weights of pairs", "no reference", "ld of TRL"),
        *("divergence of swift", "simpo", "orpo", "cpo", "simpo as cpo", "mix of swift", "simpo of axolotl"),
        *("norm of axolotl", "older norm of axolotl", "nemo's defaults", "norm of nemo"),
        *("alphapo", "simpo with alpha", "alphapo without alpha", "mix of axolotl"),
    ],
)
def test_losses_and_modifiers(name, text, expected, tmp_path):
    result = translated(tmp_path, ".yaml", text, name)
    assert not result.refused and expected.items() <= result.settings.items(), (result.refused, result.settings)
    if expected.get("preference-loss") in ("alphapo", "simpo") and "alphapo" in text:
        assert "nll-weight" not in result.settings  # loss_type alphapo has none, whatever cpo_alpha is


@pytest.mark.parametrize(
    ("name", "text", "key", "reason"),
    [
        ("trl-kto", "loss_type: sigmoid", "loss_type", "there is no loss 'sigmoid' here."),
        ("trl-kto", "label_smoothing: 0.1", "label_smoothing", "the loss kto does not use it here"),
        ("trl-bco", "max_density_ratio: 4.0", "max_density_ratio", "'4.0' cannot be had here. Undesirable answers are"),
        ("megatron-swift", "rlhf_type: kto\ncalculate_KL: false", "calculate_KL", "say loss_type apo_zero_unpaired"),
        (
            "openrlhf-kto",
            "label_key: thumb",
            "label_key",
            "'thumb' cannot be had here. Say it: --pair-columns label=NAME.",
        ),
        ("ms-swift", "rlhf_type: grpo", "rlhf_type", "'grpo' cannot be had here."),
        ("llama-factory", "stage: ppo", "stage", "'ppo' cannot be had here. This program trains on pairs"),
        ("llama-factory", "stage: kto\npref_ftx: 0.1", "pref_ftx", "the loss kto does not use it here"),
        ("trl", "loss_type: nca_pair\nf_divergence_type: forward_kl", "f_divergence_type", "nca_pair does not use it"),
        ("trl", "ld_alpha: 0.5\nloss_type: nca_pair", "ld_alpha", "nca_pair does not use it"),
        ("ms-swift", "rlhf_type: dpo\nld_alpha: 0.5", "ld_alpha", "There it weighs the policy's log-probs"),
        ("llama-factory", "stage: dpo\npref_loss: sigmoid\nld_alpha: 0.5", "ld_alpha", "not the reference's"),
        ("openrlhf", "optim: muon", "optim", "'muon' cannot be had here. Take adam."),
        ("trl-cpo", "loss_type: hinge", "loss_type", "CPO's has no reference. Take it out, and say in"),
        ("trl-cpo", "loss_type: ipo", "loss_type", "preference-loss: ipo, reference-free: true."),
        ("trl-cpo", "alpha: 0.25", "alpha", "the loss cpo does not use it here"),
        ("ms-swift", "rlhf_type: simpo\nloss_type: hinge", "loss_type", "CPO's has no reference."),
        ("ms-swift", "rlhf_type: dpo\nloss_type: [sigmoid, bco_pair]", "loss_type", "'bco_pair' cannot be had here."),
        ("megatron-swift", "f_divergence_type: forward_kl", "f_divergence_type", "Another one is left out there"),
        ("nemo-rl", "dpo.preference_loss: ipo", "dpo.preference_loss", "Whatever it says, DPO is trained there."),
        ("llama-factory", "stage: dpo\nperf_beta: 0.1", "perf_beta", "Did you mean pref_beta? Or take it out."),
    ],
    ids=[
        *("another trainer's loss", "smoothed kto", "udm", "kto without z", "labels", "grpo", "stage", "kto with sft"),
        *("divergence", "ld of TRL", "ld of swift", "ld of LLaMA-Factory", "muon"),
        *("hinge of cpo", "ipo of cpo", "alpha of cpo", "hinge of swift's cpo", "bco_pair of swift"),
        *("divergence of swift", "nemo's loss", "misspelt"),
    ],
)
def test_what_is_refused(name, text, key, reason, tmp_path):
    assert reason in translated(tmp_path, ".yaml", text, name).refused[key]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trls_reward_and_kto_settings_are_all_there():
    pytest.importorskip("trl")
    from trl import KTOConfig, ModelConfig, RewardConfig, ScriptArguments

    for name, config in (("trl-reward", RewardConfig), ("trl-kto", KTOConfig)):
        known = {each.name for part in (config, ModelConfig, ScriptArguments) for each in fields(part)}
        assert [key for key in known if BY_NAME[name].entry(key) is None] == []
