"""Configurations of other trainers become recipes: every key is a flag, without effect, or refused by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.migrate import entries, reading, translation
from megatron_bdpo.migrate.tables import SOURCES
from tests.unit.migrate.configurations import ALL

ROOT = Path(__file__).parents[3]
BY_NAME = {source.name: source for source in SOURCES}
PROGRAMS = {source.name: source.program for source in SOURCES}


def translated(
    directory: Path, name: str, text: str | None = None, processes: int | None = 8
) -> translation.Translation:
    """A configuration of ``ALL``, or another of the same trainer, by the table that its keys choose."""
    ending, example = ALL[name]
    path = directory / f"config{ending}"
    path.write_text(example if text is None else text)
    found, program = reading.read(path, PROGRAMS)
    assert program == (name if ending == ".sh" else None)
    source = translation.recognise(found, SOURCES) if text is None else BY_NAME[name]
    result = translation.translate(found, source, processes)
    told = " ".join([*result.unneeded, *result.refused, ", ".join(result.origins.values())])
    assert [key for key in found if key not in told] == [], "dropped"
    return result


#: What the examples come to: some of their flags, and all keys that are refused.
EXPECTED = {
    "trl": (
        {
            "hf-model": "Qwen/Qwen2-0.5B-Instruct",
            "pair-data": "trl-lib/ultrafeedback_binarized",
            "eval-pair-data": "trl-lib/ultrafeedback_binarized:test",
            "eval-interval": "50",
            "pairs-per-step": "128",  # 2 x 8 x 8 processes
            "train-iters": "1000",
            "lr": "5.0e-7",
            "lr-warmup-fraction": "0.1",
            "lr-decay-style": "linear",
            "weight-decay": "0.0",
            "preference-loss": "dpo",
            "beta": "0.05",
            "seq-length": "2048",
            "bf16": True,
            "save": "Qwen2-0.5B-DPO",
            "save-hf": "Qwen2-0.5B-DPO/hf",
            "save-interval": "500",
        },
        set(),
    ),
    "ms-swift": (
        {
            "lora-rank": "8",
            "lora-alpha": "32",
            "lora-targets": "all-linear",
            "lora-dropout": "0.05",
            "pairs-per-step": "128",
            "nll-weight": "0.1",
            "eval-share": "0.01",
            "lr-decay-style": "cosine",
            "seq-length": "4096",
            "bf16": True,
        },
        set(),
    ),
    "megatron-swift": (
        {
            "pairs-per-step": "4",
            "tensor-model-parallel-size": "4",
            "expert-model-parallel-size": "8",
            "moe-grouped-gemm": True,
            "recompute-method": "uniform",
            "min-lr": "1e-6",
            "lr": "1e-5",
            "adam-beta2": "0.95",
            "weight-decay": "0.1",
            "nll-weight": "0.1",
            "use-distributed-optimizer": True,
        },
        set(),
    ),
    "llama-factory": (
        {
            "preference-loss": "simpo",
            "simpo-gamma": "0.5",
            "beta": "0.1",
            "lora-rank": "8",
            "lora-targets": "all-linear",
            "max-pairs": "1000",
            "seq-length": "4096",
            "pairs-per-step": "64",
        },
        {"dataset"},
    ),
    "axolotl": (
        {
            "pair-data": ["org/first", "org/second"],
            "eval-share": "0.05",
            "lora-rank": "32",
            "lr-warmup-iters": "10",
            "lr-decay-style": "cosine",
            "recompute-granularity": "full",
            "bf16": True,
            "pairs-per-step": "64",
        },
        {"load_in_8bit", "evals_per_epoch"},
    ),
    "nemo-rl": (
        {
            "beta": "0.05",
            "pairs-per-step": "128",
            "train-iters": "150",
            "lr": "5.0e-6",
            "adam-beta2": "0.98",
            "clip-grad": "1.0",
            "lr-decay-style": "constant",
            "tensor-model-parallel-size": "2",
            "bf16": True,
            "save-interval": "50",
            "pair-data": "pairs.jsonl",
            "tokenizer-model": "meta-llama/Llama-3.2-1B-Instruct",
        },
        set(),
    ),
    "openrlhf": (
        {
            "preference-loss": "dpo",
            "lr": "5e-7",
            "min-lr": "5e-08",
            "lr-decay-style": "cosine",
            "lr-warmup-fraction": "0.03",
            "adam-beta1": "0.9",
            "adam-beta2": "0.98",
            "save-hf": "./checkpoint/llama3-8b-dpo",
            "pairs-per-step": "256",
        },
        set(),
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_published_examples(name, tmp_path):
    result = translated(tmp_path, name)
    expected_settings, expected_refused = EXPECTED[name]
    assert result.source.name == name
    assert {flag: result.settings.get(flag) for flag in expected_settings} == expected_settings
    assert set(result.refused) == expected_refused, result.refused


def check_recipe(path: str) -> list[str]:
    """On a rank: the flags of a recipe, as the job's own parser has them."""
    from megatron_bdpo.training.flags.arguments import Arguments

    return sorted(Arguments.parse(["--recipe", path]).recipe)


@pytest.mark.parametrize("name", ALL)
def test_a_job_reads_the_recipe(ranks, name, tmp_path, capsys):
    ending, text = ALL[name]
    config, recipe = tmp_path / f"config{ending}", tmp_path / "recipe.yaml"
    config.write_text(text)
    assert main(["migrate", str(config), "--processes", "8", "--partial", "-o", str(recipe)]) == 0
    (flags,) = ranks(1)(check_recipe, str(recipe))
    expected = {flag for flag, value in translated(tmp_path, name).settings.items() if value is not False}
    assert expected <= set(flags)


def flags_of(entry: entries.Entry) -> set[str]:
    match entry:
        case entries.To():
            return {entry.flag, *entry.beside, *entry.shares}
        case entries.Switch() | entries.Factor() | entries.Joined():
            return {entry.flag}
        case entries.Each():
            return set(entry.flags)
        case entries.ShareOrCount():
            return {entry.share, entry.count}
        case entries.Choice():
            return {flag for meaning in entry.values.values() if not isinstance(meaning, str) for flag in meaning}
        case entries.LossOption():
            return {name.replace("_", "-") for name in (entry.name, *entry.by_loss.values())}
        case _:
            return set()


def test_every_flag_of_the_tables_exists(ranks):
    from tests.unit.repository.test_docs import known_flags

    (known,) = ranks(1)(known_flags)
    for source in SOURCES:
        written = {f"--{flag}" for entry in source.keys.values() for flag in flags_of(entry)}
        assert written - known == set(), source.name


def test_tables_hold_together():
    """Defaults and gates are of keys that the table has; a reason or an advice is a sentence."""
    for source in SOURCES:
        for key in (*source.defaults, *(gate.key for gate in source.gates)):
            assert source.entry(key) is not None, (source.name, key)
        for key in (key for gate in source.gates for key in gate.keys):
            below = [known for known in source.keys if known.startswith(key.removesuffix("*"))]
            assert below if key.endswith(".*") else source.entry(key), (source.name, key)
        for key, entry in source.keys.items():
            if isinstance(entry, entries.Refused):
                assert entry.advice.endswith("."), (source.name, key)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trls_own_settings_are_all_there():
    """Each field of TRL's configurations has a line, and where nothing is said, what TRL does."""
    pytest.importorskip("trl")
    from trl import DPOConfig, ModelConfig, ScriptArguments
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    for name, *configs in (
        ("trl", DPOConfig, ModelConfig, ScriptArguments),
        ("trl-cpo", CPOConfig, ModelConfig, ScriptArguments),
        ("trl-orpo", ORPOConfig, ModelConfig, ScriptArguments),
    ):
        known = {each.name: each for config in configs for each in fields(config)}
        assert [key for key in known if BY_NAME[name].entry(key) is None] == []
        for key, default in BY_NAME[name].defaults.items():
            if key in known and key not in (
                "bf16",
                "eval_steps",
                "loss_type",
                "save_steps",
            ):  # made in __post_init__, or the trainer's
                assert float(default.value) == known[key].default if _number(default.value) else True, (name, key)


def _number(text: str) -> bool:
    return text.replace(".", "").replace("e-", "").isdigit()


# What is refused

MISSING_LOSS = "there is no loss 'no_such_loss' here. `megatron-bdpo losses` lists what there is."


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("loss_type: no_such_loss", "loss_type", MISSING_LOSS),
        ("loss_type: [sigmoid, no_such_loss]\nloss_weights: [1, 2]", "loss_type", MISSING_LOSS),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1]", "loss_type", "loss_weights are not 2 numbers"),
        ("loss_type: [sigmoid, sft]\nrpo_alpha: 1", "rpo_alpha", "the loss dpo=1,sft=1 does not use it here"),
        (
            "loss_type: sigmoid\nloss_weights: 2",
            "loss_weights",
            "the loss is one: its weight scales the gradient",
        ),
        ("loss_type: ipo\nlabel_smoothing: 0.1", "label_smoothing", "the loss ipo does not use it here. Take it out."),
        ("no_such_key: 1", "no_such_key", "TRL has no such key that this program knows. Take it out."),
        ("learning_rate: fast", "learning_rate", "'fast' is no number. Mend it."),
        ("max_length: 10.5", "max_length", "'10.5' is no whole number. Mend it."),
        ("bf16: 3", "bf16", "'3' is neither true nor false. Mend it."),
        ("optim: adafactor", "optim", "'adafactor' cannot be had here. Its numbers are another optimizer's."),
        ("load_in_4bit: true", "load_in_4bit", "Adapters stand beside weights in half precision."),
        ("warmup_steps: 10\nwarmup_ratio: 0.1\nmax_steps: 3\nbf16: false\ndtype: bfloat16", "dtype", "Keep one."),
        ("eval_strategy: steps", "dataset_test_split", "goes together with dataset_name, which is not there."),
    ],
    ids=[
        *("loss", "term", "weights", "option of none", "weight of one"),
        *("option", "unknown", "number", "whole", "switch", "choice", "refused", "conflict", "joined"),
    ],
)
def test_refusals(text, key, reason, tmp_path):
    refused = translated(tmp_path, "trl", text).refused
    assert key in refused and reason in refused[key], refused
    assert set(refused) == {key}


def test_a_batch_of_each_process_needs_their_number(tmp_path):
    refused = translated(
        tmp_path, "trl", "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2", None
    ).refused
    (why,) = refused.values()
    assert "--pairs-per-step is 4 x 2 times the number of data-parallel processes. Say that: --processes N." in why


def test_what_counts_only_with_another_key(tmp_path):
    without = translated(tmp_path, "trl", "lora_r: 4\neval_steps: 10\nlr_scheduler_type: constant\nwarmup_ratio: 0.1")
    assert "lora-rank" not in without.settings and "eval-interval" not in without.settings
    assert "lr-warmup-fraction" not in without.settings
    assert without.unneeded["lora_r"] == "counts only with use_peft: true"
    assert translated(tmp_path, "trl", "use_peft: true\nlora_r: 4").settings["lora-alpha"] == "32"
    both = translated(tmp_path, "trl", "max_steps: 5\nnum_train_epochs: 2")
    assert both.settings["train-iters"] == "5" and "pair-epochs" not in both.settings
    assert both.unneeded["num_train_epochs"] == "max_steps goes before it"
    assert translated(tmp_path, "trl", "max_steps: -1\nnum_train_epochs: 2").settings["pair-epochs"] == "2"


def test_a_reference_that_moves(tmp_path):
    moves = {"reference": "resident", "sync-reference-every": "512", "sync-reference-mix": "0.6"}
    assert moves.items() <= translated(tmp_path, "trl", "sync_ref_model: true").settings.items()
    both = translated(tmp_path, "trl", "sync_ref_model: true\nprecompute_ref_log_probs: true")
    assert "Keep one." in both.refused["precompute_ref_log_probs"] + both.refused.get("sync_ref_model", "")


def test_a_mix_of_losses(tmp_path):
    text = "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]\nbeta: 0.2"
    found = translated(tmp_path, "trl", text)
    assert {"preference-loss": "dpo=0.8,bco_pair=0.2,sft=1.0", "beta": "0.2"}.items() <= found.settings.items()
    assert found.origins["preference-loss"] == "loss_type, loss_weights" and not found.refused
    one = translated(tmp_path, "trl", "loss_type: sigmoid\nloss_weights: [1.0]")
    assert one.settings["preference-loss"] == "dpo" and one.unneeded["loss_weights"] == "the loss is one"
    assert translated(tmp_path, "trl", "loss_type: [ipo, sft]").settings["preference-loss"] == "ipo=1,sft=1"


def test_what_is_not_quite_the_same_is_noted(tmp_path, capsys):
    """An NLL term is a mean over the batch's tokens in TRL, and over pairs here."""
    note = "a mean over the batch's tokens there, over pairs here"
    (tmp_path / "dpo.yaml").write_text("loss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\n")
    assert main(["migrate", str(tmp_path / "dpo.yaml"), "--from", "trl", "--processes", "1"]) == 0
    assert f"preference-loss: dpo=1,sft=0.5  # loss_type, loss_weights; sft is {note}\n" in capsys.readouterr().out
    (tmp_path / "cpo.yaml").write_text("loss_type: sigmoid\n")
    assert main(["migrate", str(tmp_path / "cpo.yaml"), "--from", "trl-cpo", "--processes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == {"nll-weight": note}
    (tmp_path / "orpo.yaml").write_text("rl: orpo\norpo_alpha: 0.1\n")
    assert main(["migrate", str(tmp_path / "orpo.yaml"), "--from", "axolotl", "--processes", "1"]) == 0
    assert "# rl; its NLL is of prompt and answer there" in capsys.readouterr().out


def test_orpo_and_cpo_are_losses_of_their_own(tmp_path):
    assert translated(tmp_path, "trl", "beta: 0.2").settings["beta"] == "0.2"
    for name, text, expected in (
        ("trl-orpo", "beta: 0.2", {"preference-loss": "orpo", "orpo-weight": "0.2"}),
        ("trl-cpo", "beta: 0.2", {"preference-loss": "cpo", "beta": "0.2", "nll-weight": "1.0"}),
        ("trl-cpo", "loss_type: simpo\ncpo_alpha: 0.0", {"preference-loss": "simpo", "nll-weight": "0.0"}),
        ("trl-cpo", "cpo_alpha: 0", {"preference-loss": "cpo", "nll-weight": "0"}),  # else it would be 1
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        settings = translation.translate(reading.read(path, PROGRAMS)[0], BY_NAME[name], 1).settings
        assert expected.items() <= settings.items()


# The program


def test_the_program(tmp_path, capsys):
    config = tmp_path / "dpo.yaml"
    config.write_text(ALL["llama-factory"][1])
    assert main(["migrate", str(config), "--processes", "8"]) == 2
    cause, advice = capsys.readouterr().err.splitlines()
    assert cause.startswith(f"error: {config}, line 16, dataset: 'dpo_demo' cannot be had here.")
    assert "pair-data" in advice
    assert main(["migrate", str(config)]) == 2
    output = capsys.readouterr()
    assert (
        "2 keys cannot be translated: dataset, per_device_train_batch_size x gradient_accumulation_steps." in output.err
    )
    assert "Say that: --processes N." in " ".join(output.out.split())
    assert main(["migrate", str(config), "--processes", "8", "--partial"]) == 0
    text = capsys.readouterr().out
    assert "lora-rank: 8  # lora_rank\n" in text and "# NOT translated:\n#   dataset: " in text
    assert "adam-beta2: 0.999  # LLaMA-Factory's default of adam_beta2\n" in text
    assert main(["migrate", str(config), "--processes", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["source"] == "llama-factory" and set(told["refused"]) == {"dataset"}


def test_no_torch_is_loaded(tmp_path):
    (tmp_path / "dpo.yaml").write_text(ALL["trl"][1])
    script = (
        "import sys\nfrom megatron_bdpo.cli.main import main\n"
        f"assert main(['migrate', {str(tmp_path / 'dpo.yaml')!r}, '--processes', '8']) == 0\n"
        "sys.exit(str([name for name in ('torch', 'megatron') if name in sys.modules]))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.strip() == "[]", ended.stderr
