"""The program as a user types it: what every sub-command says, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest

from megatron_bdpo.cli.main import cli, main
from megatron_bdpo.losses import registry
from tests.harness.jobs import DATA
from tests.harness.program import ROOT, TINY, TOKENIZER, run


def commands(group: click.Group, *names: str) -> list[tuple[str, ...]]:
    """All sub-commands, as their words."""
    found: list[tuple[str, ...]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found += commands(command, *names, name) if isinstance(command, click.Group) else [(*names, name)]
    return found


def command_of(names: tuple[str, ...]) -> click.Command:
    """A sub-command by its words."""
    command: click.Command = cli
    for name in names:
        command = command.get_command(click.Context(command), name)  # type: ignore[attr-defined]
    return command


ALL = commands(cli)

#: Sub-command -> arguments that it cannot use, and a word of the reason.
WRONG = {
    "convert merge": [
        (["--adapters", "nowhere", "--hf-model", "nowhere", "--output", "merged"], "nowhere"),
        (["--adapters", ".", "--hf-model", "nowhere"], "--output"),
    ],
    "data check": [
        (["nowhere.jsonl"], "no such file"),
        ([], "PAIRS"),
        (["a.jsonl", "--show", "-1"], "--show"),
        (["a.jsonl", "--pair-format", "nonsense"], "--pair-format"),
        (["a.jsonl", "--pair-columns", "prompt"], "'prompt' does not name two columns"),
        ([str(DATA / "train.jsonl"), "--pairs-from", "all"], "--pairs-from all makes no difference"),
    ],
    "data prepare": [([str(DATA / "train.jsonl")], "no tokenizer"), (["nowhere.jsonl", *TOKENIZER], "no such file")],
    "data show": [
        ([str(DATA / "train.jsonl"), "--row", "3"], "no tokenizer"),
        ([str(DATA / "train.jsonl"), *TOKENIZER], "--row"),
        ([str(DATA / "train.jsonl"), "--row", "3000", *TOKENIZER], "line 3000 is not there"),
        ([str(DATA / "trian.jsonl"), "--row", "3", *TOKENIZER], "no such file"),
        ([str(DATA / "train.jsonl"), "--row", "3", "--hf-model", str(DATA)], "no config.json"),
    ],
    "data add-reference": [(["nowhere", "rows.jsonl"], "holds no reference scores")],
    "data stats": [
        ([str(DATA / "train.jsonl"), "--tokenizer-type", "Nonsense"], "tokenizer-type"),
        ([str(DATA / "train.jsonl"), *TOKENIZER[:3], str(DATA / "train.jsonl")], "tokenizer cannot be built"),
        ([str(DATA / "train.jsonl"), "--recipe", str(DATA)], "cannot be read"),
        ([str(DATA / "train.jsonl"), *TOKENIZER, "--pairs-from", "all"], "--pairs-from all makes no difference"),
        ([str(DATA / "train.jsonl"), *TOKENIZER, "--pair-columns", "a=b"], "no format reads a column 'a'"),
    ],
    "score": [(["--no-such-flag"], "--no-such-flag"), (["--pair-data", "nowhere.jsonl"], "")],
    "train": [
        (["--no-such-flag"], "--no-such-flag"),
        (["--ranks", "0"], "--ranks"),
        ([], "nothing is given"),
        (["--hf-model", "x"], "missing: --pair-data, --pairs-per-step, --seq-length, --lr, --pair-epochs."),
        ([*TINY, "--train-iters", "-3"], "--train-iters must be"),
    ],
    "convert export": [
        (["--checkpoint", "x", "--output", "y"], "--family"),
        ([], "--checkpoint"),
        (["--checkpoint", "x", "--output", "y", "--family", "llama", "--push-to-hub", "a/b/c"], "--push-to-hub a/b/c"),
    ],
    "convert import": [(["--hf-model", "./nowhere", "--output", "y"], "nowhere"), (["--dtype", "fp8"], "--dtype")],
    "plan": [
        (["--hf-model", "./nowhere", "--gpus", "8"], "nowhere"),
        (["--gpus", "8"], "--hf-model, --recipe"),
        (["--hf-model", "x", "--gpus", "0"], "--gpus"),
        (["--hf-model", "x", "--gpus", str(10**12)], "--gpus"),
        (["--hf-model", "x", "--gpus", "8", "--gpu-memory", "nan"], "not a number"),
        (["--hf-model", "x", "--gpus", "8", "--tokens-per-pair", "inf"], "--tokens-per-pair"),
    ],
    "migrate": [
        (["nowhere.yaml"], "cannot be read"),
        ([str(ROOT / "recipes" / "tiny.yaml"), "--from", "nonsense"], "--from"),
        ([str(ROOT / "mkdocs.yml")], "most of these keys are nobody's"),
    ],
    "report": [(["./nowhere", "--text-only"], "nowhere"), (["x", "--pairs", "-1"], "--pairs"), (["--nonsense"], "")],
    "losses": [
        (["nonsense"], "unknown loss"),
        (["--json", "--markdown"], "two forms of one output"),
        (["dpo", "--loss-file", "my_loss.py"], "each name a loss"),
        (["--loss-file", "nowhere.py"], "nowhere.py cannot be read"),
    ],
    "completion": [(["tcsh"], "'tcsh' is not one of"), ([], "{bash|zsh|fish}")],
}


def test_every_sub_command_is_given_wrong_input():
    assert {" ".join(names) for names in ALL} == set(WRONG)


@pytest.mark.parametrize(
    ("command", "words", "reason"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_wrong_input(ranks, command, words, reason):
    """A line of cause, one of advice, exit code 2; nothing of Python."""
    ((code, _, errors),) = ranks(1)(run, *command.split(), *words)
    assert code == 2, errors
    cause, advice, *more = [line for line in errors.splitlines() if "Warning" not in line]
    assert cause.startswith("error: ") and reason in cause
    assert advice.startswith("advice: ") and len(advice) > 15
    assert not more


def test_traceback_on_request_only(capsys):
    assert main(["--debug", "losses", "nonsense"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "error: unknown loss 'nonsense'" in shown
    assert "MEGATRON_BDPO_DEBUG" not in os.environ


def test_a_fault_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(registry, "get", lambda name: 1 / 0)
    assert main(["losses", "dpo"]) == 1
    expected = [
        "error: ZeroDivisionError: division by zero",
        "advice: this should not happen. Its traceback: megatron-bdpo --debug losses dpo",
    ]
    assert capsys.readouterr().err.splitlines() == expected
    assert main(["--debug", "losses", "dpo"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("names", [(), *ALL])
def test_help_has_an_example_of_its_own(names):
    command = command_of(names)
    assert command.help and f"megatron-bdpo {' '.join(names)}".rstrip() in (command.epilog or "")


def test_help_of_a_command_without_arguments(capsys):
    assert main([]) == 2 and "Commands:" in capsys.readouterr().err
    assert main(["data", "check", "--help"]) == 0 and "--show" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "score"])
def test_help_of_the_training(capsys, command):
    """The flags of most jobs by task; all of them, Megatron's too, with another flag."""
    assert _help(command, "--help", capsys).count("\n") <= 150
    every = _help(command, "--help-all", capsys)
    for words in (f"Usage: megatron-bdpo {command}", "Example:", "--preference-loss", "--moe-router-topk"):
        assert words in every


def _help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([command, flag])
    return capsys.readouterr().out


def test_flags_pass_through_untouched(monkeypatch):
    from megatron_bdpo.training import entry

    seen: list[list[str]] = []
    monkeypatch.setattr(entry, "train", lambda flags: seen.append(list(flags)))
    flags = ["--lr", "1e-6", "-x", "--name=value", "--recipe", "{a: -1}", "-1", "--version", "--debug"]
    assert main(["train", "--ranks", "1", *flags]) == 0
    assert seen == [flags]


def test_the_package_is_the_program():
    ended = subprocess.run([sys.executable, "-m", "megatron_bdpo", "no-such"], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stderr.startswith("error: No such command 'no-such'.")


def test_versions(capsys):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[0] for line in lines]
    assert found[:6] == ["megatron_bdpo", "python", "megatron-core", "torch", "transformer-engine", "transformers"]
    assert {"datasets", "numpy", "safetensors", "tokenizers"} <= {*found}
    assert found[-3:] == ["commit", "CUDA", "GPU"]
    assert all(len(line.split()) > 1 for line in lines)


def test_completion():
    environment = os.environ | {"_MEGATRON_BDPO_COMPLETE": "bash_complete", "COMP_WORDS": "megatron-bdpo da"}
    environment |= {"COMP_CWORD": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_bdpo.cli.main"], capture_output=True, text=True, env=environment
    )
    assert ended.stdout.strip() == "plain,data", ended.stderr


def test_flags_of_a_job_are_completed():
    found = command_of(("train",)).shell_complete(click.Context(command_of(("train",))), "--pairs-per")
    assert [item.value for item in found] == ["--pairs-per-step"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(capsys, shell):
    assert main(["completion", shell]) == 0
    assert f"_MEGATRON_BDPO_COMPLETE={shell}_complete" in capsys.readouterr().out


# losses


def test_losses(capsys):
    assert main(["losses", "--json"]) == 0
    losses = {loss["name"]: loss for loss in json.loads(capsys.readouterr().out)}
    assert tuple(losses) == registry.names()
    assert losses["bdpo"]["reads"] == ["reference", "comprehension"] and losses["simpo"]["reads"] == []
    assert losses["safedpo"]["reads"] == ["reference", "safety labels"]
    assert losses["kto"]["reads"] == ["labels of answers", "reference", "answers after other prompts", "its step"]
    assert [losses[name]["of"] for name in ("bdpo", "pl_dpo", "kto")] == ["pairs", "groups", "answers"]
    for name, loss in losses.items():
        given = {option["flag"][2:].replace("-", "_"): option["default"] for option in loss["options"]}
        assert registry.build_options(name, given) == registry.get(name).options()
    assert main(["losses"]) == 0
    assert "--bdpo-temperature 1\n" in capsys.readouterr().out  # (or auto) is on the next line
    assert main(["losses", "bdpo"]) == 0
    assert "switches this off: apply the balanced weights" in capsys.readouterr().out


def test_a_mix_is_explained_with_the_options_of_its_terms(capsys):
    assert main(["losses", "bdpo=1,sigmoid_norm=2", "--json"]) == 0
    (mix,) = json.loads(capsys.readouterr().out)
    options = {option["flag"]: option["default"] for option in mix["options"]}
    assert options["--beta"] == "own" and options["--bdpo-temperature"] == 1 and "--nll-weight" not in options
    assert main(["losses", "bdpo=1,sigmoid_norm=2"]) == 0
    assert "own: each term's" in capsys.readouterr().out


# train, as a program of its own


def test_train_on_two_ranks(tmp_path):
    """Through torchrun: a refusal ends with 2, without torchrun's table; and what is right trains."""
    recipe = ["--recipe", str(ROOT / "recipes" / "tiny.yaml"), "--train-iters", "1", "--max-pairs", "32"]
    recipe += ["--recipe", "{eval-pair-data: null, eval-at-start: null}", "--pair-cache-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def program(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_bdpo.cli.main", "train", "--ranks", "2", *recipe, *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)

    refused = program("--preference-loss", "nonsense")
    assert refused.returncode == 2
    assert "error: unknown loss 'nonsense'" in refused.stderr and "Traceback" not in refused.stderr
    trained = program("--tensor-model-parallel-size", "2")
    assert trained.returncode == 0, trained.stderr
    assert "loss" in trained.stdout
