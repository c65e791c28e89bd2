"""What flags show by themselves is told in a moment, without torch and Megatron."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.jobs import DATA

ROOT = Path(__file__).parents[3]

HEAVY = {"torch", "megatron", "datasets", "matplotlib", "rich", "transformers"}


@dataclass
class Ended:
    """A program that has ended."""

    code: int
    output: str
    errors: str
    seconds: float
    """Of the processor."""
    heavy: set[str]
    """What it has imported of what takes seconds."""


def program(*words: str, module: str = "megatron_bdpo.cli.main") -> Ended:
    """Run a program in a process of its own, as a shell does."""
    script = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; code = 0\n"
        "try:\n runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended:\n code = ended.code or 0\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('\\nUSED', code, used.ru_utime + used.ru_stime, *sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, module, *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    errors, _, used = ended.stderr.rpartition("\nUSED ")
    code, seconds, *modules = used.split()
    return Ended(int(code), ended.stdout, errors, float(seconds), HEAVY & set(modules))


#: Command line -> seconds of the processor that it may take, and what it says; without torch or Megatron.
QUICK = {
    "--version": (0.5, "megatron-core"),
    "--help": (0.5, "Commands:"),
    "train --help": (1.0, "--pairs-per-step N"),
    "train --help-all": (1.0, "--moe-router-topk"),
    "score --help": (1.0, "--reference-cache DIR"),
    "completion bash": (0.5, "complete -o nosort"),
    f"data check {DATA / 'train.jsonl'}": (0.5, "pairs: 396 kept"),
    f"train --recipe {ROOT / 'recipes' / 'tiny.yaml'} --lr 3e-3 --print-config": (1.0, "lr: 3e-3"),
    "train --pairs-per-stp 8": (1.0, "Did you mean --pairs-per-step?"),
    "train --per_device_train_batch_size 8": (
        1.0,
        "What other trainers call per_device_train_batch_size is --pairs-per",
    ),
    "train --loss_type sigmoid": (1.0, "What other trainers call loss_type is --preference-loss"),
    "train --preference-loss sigmoid": (1.0, "What other trainers call sigmoid is --preference-loss dpo."),
    "train --preference-loss bdppo": (1.0, "Did you mean bdpo?"),
    "train --preference-loss dpo --simpo-gamma 1": (1.0, "--simpo-gamma is not used by the loss 'dpo'"),
    "train --preference-loss dpo=1,sft=0.1 --print-config": (1.0, "preference-loss: dpo=1,sft=0.1"),
    "train --preference-loss dpo=1,nope=2": (1.0, "unknown loss 'nope'"),
    "train --preference-loss dpo=1,sft=0.1 --simpo-gamma 1": (1.0, "--simpo-gamma is not used by the loss 'dpo=1,sft"),
    "train --lr fast": (1.0, "invalid float value: 'fast'"),
    "train --recipe '{learning_rate: 1e-6}'": (1.0, "What other trainers call learning_rate is --lr."),
    "train --recipe nowhere.yaml": (1.0, "--recipe nowhere.yaml cannot be read"),
    "train --ranks 2 --nonsense": (1.0, "unrecognized arguments: --nonsense"),
    "train": (1.0, "needs the model (--hf-model), the pairs (--pair-data) and the steps"),
}


@pytest.mark.parametrize("words", QUICK)
def test_what_flags_show_is_quick(words):
    seconds, expected = QUICK[words]
    ended = program(*shlex.split(words))
    assert expected in ended.output + ended.errors
    assert ended.code == (0 if ended.output else 2)
    assert not ended.heavy
    assert ended.seconds <= seconds


def test_torchrun_shows_it_once(monkeypatch):
    """Each rank of a launcher that has given them these numbers."""
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        helped = program("--help", module="megatron_bdpo.train")
        assert (helped.code, bool(helped.output)) == (0, rank == "0")
        refused = program("--pairs-per-stp", "8", module="megatron_bdpo.train")
        assert (refused.code, "--pairs-per-step" in refused.errors) == (2, rank == "0")
        assert not refused.heavy


def test_what_the_table_does_not_know_is_no_recipe(tmp_path):
    """An own loss has flags of its own: what results is not printed in part."""
    file = tmp_path / "own.py"
    file.write_text("SPEC = None\n")
    ended = program("train", "--loss-file", str(file), "--print-config")
    assert ended.code == 2 and "--print-config knows the flags of megatron-core" in ended.errors
