"""Configurations as files: what cannot be read, scripts as the shell reads them, and whose a file is."""

from __future__ import annotations

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.migrate import reading, translation
from megatron_bdpo.migrate.tables import SOURCES
from tests.unit.migrate.test_migrate import BY_NAME, PROGRAMS


@pytest.mark.parametrize(
    ("ending", "text", "reason"),
    [
        (".yaml", "a: [", "not YAML"),
        (".yaml", "- a", "a configuration is a mapping"),
        (".yaml", "beta: 1\nbeta: 2", "line 2, beta: stands there twice"),
        (".yaml", "policy:\n  a: ${policy.b}", "refers to nothing in this file"),
        (".yaml", "policy:\n  a: ${mul:2,3}", "is computed"),
        (".sh", "echo hello", "'echo' belongs to no flag"),
        (".sh", "# nothing", "no flags of a training run"),
        (".sh", "llamafactory-cli train dpo.yaml", "'dpo.yaml' belongs to no flag. Give that file in the place of"),
        (".sh", "trl dpo --beta 'x", "cannot be split into words"),
        (".sh", "trl dpo --seed $(date +%s) --beta 1", "is computed by the shell. Write out what it comes to"),
        (".sh", "trl dpo --seed `date +%s` --beta 1", "is computed by the shell. Write out what it comes to"),
        (".sh", "trl dpo --beta 1\ntrl dpo --beta 2\n", "starts more than one training run"),
        (".sh", "trl dpo --beta 1 --beta 2", "--beta: stands there twice"),
        (".yaml", "loss_type: sigmoid\ntraining: yes please", ""),
    ],
)
def test_files_that_cannot_be_read(ending, text, reason, tmp_path):
    path = tmp_path / f"config{ending}"
    path.write_text(text)
    if reason:
        with pytest.raises(UserError, match=reason.replace("(", r"\(")):
            reading.read(path, PROGRAMS)
    else:
        assert set(reading.read(path, PROGRAMS)[0]) == {"loss_type", "training"}


def test_a_script_is_read_to_its_end(tmp_path):
    """What the shell makes of a command: nothing behind a quoted blank, a hash in a name or a quotient is dropped."""
    path = tmp_path / "dpo.sh"
    path.write_text(
        'export MODEL="org/model"\nn=4\n'
        "trl dpo --model_name_or_path $MODEL --dataset_name org/data#100 --run_name '' \\\n"
        "    --gradient_accumulation_steps $(expr 32 / $n) --warmup_steps $((100/3)) --output_dir ${OUT}/$MODEL \\\n"
        '    --beta 0.2 "$@" 2> log.txt  # --seed 1\n'
    )
    found, _ = reading.read(path, PROGRAMS)
    assert {key: given.value for key, given in found.items()} == {
        "model_name_or_path": "org/model",
        "dataset_name": "org/data#100",
        "run_name": "",
        "gradient_accumulation_steps": "8",
        "warmup_steps": "33",
        "output_dir": "${OUT}/org/model",  # the recipe takes OUT from the environment
        "beta": "0.2",
    }


def test_a_switch_that_is_turned_off(tmp_path):
    """transformers' parser has --no_KEY of each that is on by default; a key that is called so has its own line."""
    config = tmp_path / "dpo.sh"
    config.write_text("trl dpo --model_name_or_path m --no_bf16 --no_remove_unused_columns --no_such_key")
    found, program = reading.read(config, PROGRAMS)
    result = translation.translate(found, BY_NAME[program], 1)
    assert result.settings["bf16"] is False and "remove_unused_columns" in result.unneeded
    assert set(result.refused) == {"no_such_key"}
    assert BY_NAME["megatron-swift"].entry("no_save_optim") is not None


def test_keys_of_nobody_and_of_several(tmp_path):
    path = tmp_path / "config.yaml"
    for text, reason in (
        ("nonsense: 1", "most of these keys are nobody's"),
        ("seed: 1", "Say whose configuration it is"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            translation.recognise(reading.read(path, PROGRAMS)[0], SOURCES)
