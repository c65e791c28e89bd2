"""No command of the documents is only words: each is run on small stand-ins, or what it is given is checked.

A training run becomes a dry run at its own number of ranks, with the real models' configurations and a tiny tokenizer;
the quick start's is run as it stands. Programs that take hours are asked for their help: the flags have to be in it.
What another test runs names that test, and what cannot be run here names the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.documents import ROOT, Command, commands
from tests.harness.lora import make_adapter
from tests.harness.program import run
from tests.unit.migrate import configurations
from tests.unit.repository.test_docs import known_flags
from tests.unit.training.test_dry_run import LLAMA_8B, LLAMA_70B, QWEN2_7B, SMOLLM2_135M

EXAMPLES = "tests/unit/examples"
OWN_LOSS = "tests/unit/repository/test_docs.py::test_example_of_an_own_loss"

OWN_CALLBACK = "tests/unit/repository/test_docs.py::test_example_of_an_own_callback"

REWARDS = "tests/hf/test_reward_models.py::test_scoring_writes_transformers_rewards"

#: Beginning of a command -> the test that runs it.
ELSEWHERE = {
    "python examples/plain_torch.py": f"{EXAMPLES}/test_plain_torch.py::test_the_example_learns",
    "python examples/data/make_data.py": f"{EXAMPLES}/test_example_data.py::test_generator_reproduces_the_files",
    "bash slurm/bdpo_70b.sh --dry-run": "tests/slurm/test_launch.py::test_dry_run_of_the_70b_job",
    "sbatch": "tests/slurm/test_launch.py::test_two_nodes_of_two_ranks",
    "scancel": "tests/slurm/test_launch.py::test_stop_in_mid_run",
    "touch RUN_DIR/STOP": "tests/slurm/test_launch.py::test_kill_switch",
    "pip install --no-deps --no-build-isolation examples/own_loss": OWN_LOSS,
    "pip install --no-deps --no-build-isolation examples/own_callback": OWN_CALLBACK,
    "torchrun --nproc-per-node 8 -m megatron_bdpo.score --objective reward": REWARDS,
    "megatron-bdpo losses exponential": OWN_LOSS,
    "megatron-bdpo train --preference-loss exponential": OWN_LOSS,
    "megatron-bdpo --debug": "tests/unit/cli/test_cli.py::test_traceback_on_request_only",
    "eval $(megatron-bdpo completion bash)": "tests/unit/cli/test_cli.py::test_completion_script",
}

#: Beginning of a command -> why nobody runs it.
NOT_HERE = {
    "git clone https://github.com/NVIDIA/apex": "the network",
    "cd apex": "what was cloned",
    "git worktree add runs/before d61c32e": "an older commit, which a shallow clone has not",
    "pip install -v --no-build-isolation .": "NVIDIA Apex, which needs nvcc",
    "vllm serve": "another program, and a GPU",
    "lm_eval": "another program, and a GPU",
    "export": "settings of the next command, which is checked with them",
    "for": "the head of a loop, whose body is checked",
}

#: What the documents leave to the reader.
FLAGS = [
    "--hf-model",
    "MODEL",
    "--pair-data",
    "pairs.jsonl",
    "--seq-length",
    "256",
    "--reference-cache",
    "SCORES",
    "--pairs-per-step",
    "8",
    "--lr",
    "1e-2",
    "--train-iters",
    "6",
]
PLACES = {"N": ["2"], "NAME": ["bdpo"], "RUN_DIR": ["RUN"], "FLAGS": FLAGS, "$seed": ["1"]}
VARIABLES = {"$model": "qwen2_7b", "$loss": "bdpo"}

ALL = commands()


def beginning(command: Command, table: dict[str, str]) -> str | None:
    text = " ".join(command.words)
    return next((start for start in table if f"{text} ".startswith(f"{start} ") or text.startswith(f"{start}=")), None)


def filled_in(words: tuple[str, ...]) -> list[str]:
    filled = [each for word in words for each in PLACES.get(word, [word])]
    for name, value in VARIABLES.items():
        filled = [word.replace(name, value) for word in filled]
    return filled


# The stage ------------------------------------------------------------------------------------------------------------

TEXTS = {
    "prompt": "Question: what is {n} plus {n}?\nAnswer:",
    "chosen": " It is {m}.",
    "rejected": " I think {n}, or so.",
}
MESSAGES = {
    "prompt": [{"role": "user", "content": "What is {n} plus {n}?"}],
    "chosen": [{"role": "assistant", "content": "It is {m}."}],
    "rejected": [{"role": "assistant", "content": "I think {n}, or so."}],
}


def write_rows(path: Path, form: dict[str, object], count: int) -> None:
    rows = (json.dumps(form).replace("{n}", str(n)).replace("{m}", str(2 * n)) for n in range(count))
    labels = ', "chosen_safe": true, "rejected_safe": false}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row[:-1] + labels + "\n" for row in rows))


def make_files(directory: Path, chat_template: str) -> None:
    """Pairs, a model small enough to train, and the tokenizer of that with the configurations of real ones."""
    subprocess.run(
        [sys.executable, ROOT / "tests" / "first_hour" / "make_model.py", "MODEL", "pairs.jsonl"],
        cwd=directory,
        check=True,
        timeout=200,
        capture_output=True,
    )
    (directory / "ORIGINAL").symlink_to("MODEL")
    (directory / "my_loss.py").symlink_to(ROOT / "examples" / "own_loss" / "own_loss" / "__init__.py")
    make_adapter(directory / "MODEL", directory / "PEFT_ADAPTERS")
    (directory / "dpo.yaml").write_text(configurations.TRL)
    write_rows(directory / "pairs.jsonl", TEXTS, 200)
    write_rows(directory / "heldout.jsonl", TEXTS, 20)
    for name in ("train", "heldout"):
        write_rows(directory / "data" / "paper" / f"{name}.jsonl", MESSAGES, 200)
    for name, config in {
        "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
        "meta-llama/Llama-3.1-70B-Instruct": LLAMA_70B,
        "Qwen/Qwen2-7B-Instruct": QWEN2_7B,
        "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
        "runs/smollm2/model": SMOLLM2_135M,
    }.items():
        model = directory / name
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))
        for file in (directory / "MODEL").glob("tokenizer*"):
            (model / file.name).write_bytes(file.read_bytes())
        (model / "chat_template.jinja").write_text(chat_template)
    for name in ("examples", "recipes"):
        (directory / name).symlink_to(ROOT / name)


def in_directory[Result](directory: Path, function: Callable[..., Result], *arguments: object) -> Result:
    """On a rank."""
    with contextlib.chdir(directory):
        return function(*arguments)


@pytest.fixture(scope="module")
def stage(ranks, tmp_path_factory) -> Path:
    """A directory with everything that commands read, RUN and SCORES too: made by the quick start's own commands."""
    from tests.unit.conftest import CHATML_TEMPLATE

    directory = tmp_path_factory.mktemp("stage")
    make_files(directory, CHATML_TEMPLATE)
    for command in ALL:
        if command.document == "docs/quickstart.md" and is_trained_here(command):
            ((code, _, errors),) = ranks(1)(in_directory, directory, run, *command.words[1:])
            assert code == 0, errors
    return directory


def is_trained_here(command: Command) -> bool:
    """Whether it is small enough to be run as it is."""
    return command.words[1] in ("score", "train") and "MODEL" in command.words


@pytest.fixture
def place(stage, tmp_path) -> Path:
    """A directory that sees all of the stage, and takes what a command writes."""
    for path in stage.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


# How a command is checked ---------------------------------------------------------------------------------------------


def of_ours(command: Command, ranks, place: Path) -> None:
    """`megatron-bdpo ...`: run; a training run, unless the stage has run it, as a dry run."""
    words = filled_in(command.words[1:])
    if words[0] == "train" and not is_trained_here(command) and ASKING.isdisjoint(words):
        dry_run(command, words[1:], ranks, place)
    elif " ".join(words) not in NAMED:
        ((code, output, errors),) = ranks(1)(in_directory, place, run, *words)
        assert code == 0, errors
        assert output


#: Flags of a training run that trains nothing.
ASKING = {"--help", "--help-all", "--print-config"}

#: Sub-commands that a sentence names, without their arguments.
NAMED = ("report", "data check", "data stats", "migrate")


def dry_run(command: Command, words: list[str], ranks, place: Path) -> None:
    count = "1"
    if "--ranks" in words:
        place_of_count = words.index("--ranks") + 1
        count = words[place_of_count]
        words = words[: place_of_count - 1] + words[place_of_count + 1 :]
    if "--dry-run" not in words:
        words += ["--dry-run", count]
    for name in ("RUN", "SCORES"):  # are those of another model
        (place / name).unlink(missing_ok=True)
    environment = {"PAIR_DATA": "pairs.jsonl", "PAPER_DATA": "data/paper", "RUN_DIR": "run"} | command.environment
    (printed,) = ranks(1)(in_directory, place, _dry_run, words, environment)
    assert "dry run of" in printed and printed.endswith("ended: 0"), printed


def _dry_run(words: list[str], environment: dict[str, str]) -> str:
    from tests.unit.training.test_dry_run import report

    own = any(word in ("--recipe", "--pair-data", "--hf-model") for word in words)
    return report(words if own else ["--recipe", "recipes/tiny.yaml", *words], environment)


def by_torchrun(command: Command, ranks, place: Path) -> None:
    assert command.words[1] == "--nproc-per-node"
    count, script, *words = filled_in(command.words[2:])
    if script == "examples/pretrain_bdpo.py":
        dry_run(command, [*words, "--ranks", count], ranks, place)
    elif (script, words[0]) == ("-m", "megatron_bdpo.score"):
        ((code, _, errors),) = ranks(1)(in_directory, place, run, "score", *words[1:])
        assert code == 0, errors
    elif script == "-m":
        assert importlib.util.find_spec(words[0]), words[0]
    else:
        assert (ROOT / script).exists() and script == "benchmarks/hf_load.py"
        (known,) = ranks(1)(known_flags)
        assert flags(words) <= known


def by_python(command: Command, ranks, place: Path) -> None:
    script, *words = filled_in(command.words[1:])
    if script == "examples/pretrain_bdpo.py":
        dry_run(command, words, ranks, place)
    elif script == "-m" and words[0] == "pytest":
        paths_exist(words[1:])
    elif script == "-m" and words[0].startswith("megatron_bdpo."):
        assert importlib.util.find_spec(words[0]), words[0]
    elif script == "benchmarks/hf_load.py":
        assert words[0] == "write" and f'"{words[1]}"' in (ROOT / script).read_text("utf-8")
    else:
        own, _, megatrons = " ".join(words).partition(" -- ")
        name = words[0] if script == "-m" else script
        (shown,) = ranks(1)(in_directory, ROOT, help_of, name, script == "-m")
        assert flags(own.split()) <= flags(re.findall(r"--[\w-]+", shown)), shown
        if megatrons:
            (known,) = ranks(1)(known_flags)
            assert flags(megatrons.split()) <= known


def help_of(name: str, is_module: bool) -> str:
    """What a program of the repository prints on --help. On a rank, which has loaded most of it."""
    import io

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [name, "--help"])
        patch.syspath_prepend(str((ROOT / name).parent))
        with pytest.raises(SystemExit):
            runpy.run_module(name, run_name="__main__") if is_module else runpy.run_path(name, run_name="__main__")
    return output.getvalue()


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}


def paths_exist(words: list[str]) -> None:
    paths = [word for word in words if not word.startswith("-")]
    assert paths and all((ROOT / path).exists() for path in paths)


def by_pytest(command: Command, ranks, place: Path) -> None:
    paths_exist(list(command.words[1:]))


def by_make(command: Command, ranks, place: Path) -> None:
    """What it would do can be told."""
    ended = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def by_pip(command: Command, ranks, place: Path) -> None:
    """The network is left out: what is asked for is what setup.py offers."""
    wanted = re.search(r"^\.(?:\[(.*)\])?$", command.words[-1])
    assert wanted
    offered = re.search(r"EXTRAS_REQUIRE = \{(.*?)\n\}", (ROOT / "setup.py").read_text("utf-8"), re.S)
    assert offered
    assert set((wanted[1] or "hf").split(",")) <= set(re.findall(r'^    "(\w+)":', offered[1], re.M))


CHECKS = {
    "megatron-bdpo": of_ours,
    "torchrun": by_torchrun,
    "python": by_python,
    "pytest": by_pytest,
    "make": by_make,
    "pip": by_pip,
}


# The tests ------------------------------------------------------------------------------------------------------------


def test_there_are_commands():
    """The documents are read at all: some of each kind, from blocks and from sentences."""
    texts = {" ".join(command.words) for command in ALL}
    assert {"make demo", "sbatch slurm/bdpo_70b.sh", "pip install .[gpu]", "megatron-bdpo losses --markdown"} <= texts
    assert len(ALL) > 80


def test_the_reasons_are_of_use():
    """Every entry is of a command that there is, every test named there exists."""
    for table in (ELSEWHERE, NOT_HERE):
        assert set(table) == {beginning(command, table) for command in ALL} - {None}
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), test


@pytest.mark.parametrize("command", ALL, ids=str)
def test_command(command, request):
    if beginning(command, ELSEWHERE):
        for word in command.words[1:]:
            assert not word.endswith((".sh", ".py")) or (ROOT / word).exists()
    elif not beginning(command, NOT_HERE):
        assert command.program in CHECKS, "say in NOT_HERE why it cannot be run, or how it is checked"
        CHECKS[command.program](command, request.getfixturevalue("ranks"), request.getfixturevalue("place"))


def test_python_of_the_documents(ranks, place):
    """Blocks that import from the package run, beside the quick start's scores."""
    blocks = [
        (page.name, textwrap.dedent(block).strip())
        for page in sorted((ROOT / "docs").glob("*.md"))
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page.read_text("utf-8"), re.M)
        if block.strip().startswith("from megatron_bdpo")
    ]
    assert [name for name, _ in blocks] == ["comprehension.md"]
    for _, block in blocks:
        ranks(1)(in_directory, place, exec, block, {})
