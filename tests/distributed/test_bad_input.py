"""Whatever the user gets wrong ends the run on every rank with one message that names it and the way out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import jobs
from tests.harness.jobs import DATA

EXAMPLE = DATA.parent / "pretrain_bdpo.py"
GOOD_ROW = {"prompt": "Question?", "chosen": " A good answer.", "rejected": " No."}

ANSWER = {"prompt": "Question?", "completion": " A good answer.", "label": True}


def refusal(flags, **overrides):
    """The UserError that this rank's run ends with."""
    from megatron_bdpo.errors import UserError

    try:
        jobs.train(flags, **overrides)
    except UserError as error:
        return str(error)
    return "no error"


def write(path: Path, *rows) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_cases(directory: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> flags, and what the message has to say."""
    good = [GOOD_ROW | {"prompt": f"Question {number}?"} for number in range(20)]
    many = ["--max-malformed-share", "0"]
    return {
        "missing file": (["--pair-data", str(directory / "nowhere.jsonl")], r"nowhere\.jsonl"),
        "empty file": (["--pair-data", write(directory / "empty.jsonl")], r"empty\.jsonl.*empty"),
        "broken line": (
            ["--pair-data", write(directory / "broken.jsonl", *good[:3], '{"prompt": "x", \n', *good[3:]), *many],
            r"broken\.jsonl, line 4",
        ),
        "wrong type": (
            ["--pair-data", write(directory / "types.jsonl", *good[:5], GOOD_ROW | {"chosen": 7}, *good[5:])],
            r"types\.jsonl, line 6.*chosen",
        ),
        "missing column": (
            ["--pair-data", write(directory / "column.jsonl", {"prompt": "x", "chosen": "y"})],
            "rejected",
        ),
        "labelled answer": (
            ["--pair-data", write(directory / "labels.jsonl", *good[:3], ANSWER, *good[3:])],
            r"--preference-loss \w+ compares the answers of a pair, but 1 of 21 rows .*labels\.jsonl, line 4\)",
        ),
        "labelled answer for a reward model": (
            ["--objective", "reward", "--pair-data", write(directory / "reward.jsonl", *good[:3], ANSWER, *good[3:])],
            r"--objective reward compares the answers of a pair, but 1 of 21 .*Leave these rows out\.$",
        ),
        **prompt_cases(directory),
        "tokenizer": (["--tokenizer-model", str(directory / "no.model")], r"--tokenizer-model .*no\.model"),
    }


def prompt_cases(directory: Path) -> dict[str, tuple[list[str], str]]:
    """The same for --eval-prompts."""
    rows = {
        "no prompt": ({"question": "x"}, r"line 2: missing column: column 'prompt' is missing; the row has question"),
        "broken": ("{", "line 2: bad JSON"),
        "too long": ({"prompt": "a " * 600}, r"line 2: .* tokens and an answer's 64 do not fit --seq-length 512"),
        "no template": ({"prompt": [{"role": "user", "content": "Hi"}]}, "no chat template"),
        "a column of ours": ({"prompt": "Hi", "answer": "Ho"}, "line 2: .*column 'answer' is one that answers"),
        "NaN": ('{"prompt": "Hi", "score": NaN}\n', "line 2: .*none of JSON's"),
    }
    cases = {
        name: (write(directory / f"prompts {name}.jsonl", {"prompt": "Hi"}, row), f"--eval-prompts: .*{expected}")
        for name, (row, expected) in rows.items()
    }
    cases["missing"] = (str(directory / "gone.jsonl"), r"--eval-prompts: .*gone\.jsonl: there is no such file")
    return {
        f"prompts: {name}": (["--eval-share", "0.2", "--eval-prompts", path], expected)
        for name, (path, expected) in cases.items()
    }


FLAG_CASES = {
    "--eval-prompts": (["--eval-prompts", str(DATA / "heldout.jsonl")], "--eval-prompts: there are no held-out pairs"),
    "--eval-every": (["--eval-every", "5m"], r"--eval-every: there are no held-out pairs"),
    "unknown loss": (["--preference-loss", "dpoo"], r"unknown loss 'dpoo'; did you mean 'dpo'\?"),
    "unused option": (
        ["--preference-loss", "dpo", "--simpo-gamma", "1"],
        "--simpo-gamma is not used by the loss 'dpo'",
    ),
    "option out of range": (["--beta", "-1"], r"--beta must be above 0 and at most 10,000"),
    "pair longer than a pack": (["--seq-length", "64"], r"do not fit a pack of --seq-length 64.*--long-pairs drop"),
    "no pair that fits": (
        ["--seq-length", "16", "--long-pairs", "drop"],
        r"none of the 48 usable pairs.*48 pairs longer than --seq-length 16 dropped",
    ),
    "fewer pairs than ranks": (["--pairs-per-step", "1"], "cannot be split over 2 data-parallel ranks"),
    "more pairs than there are": (["--pairs-per-step", "4096"], "4096 is more than the 48 usable pairs"),
    "ranks that fit no layout": (
        ["--tensor-model-parallel-size", "4"],
        "2 ranks cannot be split into model replicas of 4",
    ),
    "fewer stages by layout than ranks": (
        ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "EttttL"],
        "pipeline_model_parallel_layout must be divisible by pipeline_model_parallel_size",
    ),
    "no layout of stages": (
        ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "E((t*"],
        r"Invalid layer character: \(",
    ),
    "layers that fit no layout": (
        ["--num-layers", "3", "--pipeline-model-parallel-size", "2"],
        "3 layers cannot be split",
    ),
    "latents that fit no layout": (
        [
            "--multi-latent-attention",
            "--kv-lora-rank",
            "5",
            "--qk-pos-emb-head-dim",
            "4",
            "--tensor-model-parallel-size",
            "2",
        ],
        r"latent of keys and values, and what is rotated \(9 rows\).*--tensor-model-parallel-size that divides it",
    ),
    "adapters beside latents": (
        ["--multi-latent-attention", "--lora-rank", "4"],
        "--multi-latent-attention: adapters stand beside",
    ),
    "a setting of its model": (["--hidden-size", "30"], "Megatron refused"),
    "batch size": (["--global-batch-size", "8"], r"--pairs-per-step"),
    "dropout": (["--attention-dropout", "0.1"], r"dropout.*--attention-dropout"),
    "two run lengths": (["--pair-epochs", "2"], r"one of --train-iters .* and --pair-epochs"),
    "unknown flag": (["--pairs-per-stp", "3"], r"--pairs-per-stp.*Did you mean --pairs-per-step\?"),
    "no number": (["--pairs-per-step", "many"], r"--pairs-per-step: invalid int value: 'many'"),
    "not a finite number": (["--pair-epochs", "nan"], r"--pair-epochs: invalid .* value: 'nan'"),
    "an assertion without words": (["--num-attention-heads", "6"], r"Megatron refused the arguments: .+"),
    "nothing to start from": (["--pretrained-checkpoint", "/nowhere"], "/nowhere: there is no checkpoint in it"),
    "nowhere to save": (["--save", "/proc/x", "--save-interval", "1"], "--save /proc/x cannot be written"),
    "no held-out pairs": (["--eval-share", "0.001"], "--eval-share 0.001 of 48 usable rows is not even one"),
    "held-out pairs that are not there": (["--eval-pair-data", "gone.jsonl"], r"gone\.jsonl: there is no such file"),
    "no labels": (
        ["--preference-loss", "safedpo", "--pair-data", "UNLABELLED"],
        r"needs safety labels, but 20 of 20 pairs have none.*chosen_safe",
    ),
}


@pytest.mark.parametrize("name", FLAG_CASES)
def test_wrong_flag_is_refused_on_every_rank(ranks, tmp_path, name):
    flags, expected = FLAG_CASES[name]
    unlabelled = write(tmp_path / "plain.jsonl", *(GOOD_ROW | {"prompt": f"Question {n}?"} for n in range(20)))
    flags = [unlabelled if flag == "UNLABELLED" else flag for flag in flags]
    assert_refused(ranks(2)(refusal, flags, pair_cache_dir=str(tmp_path / "cache")), expected)


@pytest.mark.parametrize("epochs", ["0", "-3"])
def test_no_epochs_are_refused(ranks, tmp_path, epochs):
    """Instead of, not beside, a number of steps."""
    flags = ["--pair-epochs", epochs]
    assert_refused(ranks(1)(refusal, flags, train_iters=None, pair_cache_dir=str(tmp_path)), "above 0")


@pytest.mark.parametrize(
    "name",
    [
        *("missing file", "empty file", "broken line", "wrong type", "missing column", "tokenizer"),
        *("prompts: no prompt", "prompts: broken", "prompts: too long", "prompts: no template", "prompts: missing"),
        *("prompts: a column of ours", "prompts: NaN"),
    ],
)
def test_bad_data_is_refused_on_every_rank(ranks, tmp_path, name):
    flags, expected = data_cases(tmp_path)[name]
    cache = tmp_path / "cache"
    assert_refused(ranks(2)(refusal, flags, pair_cache_dir=str(cache)), expected)
    if not name.startswith("prompts: "):
        assert not list(cache.glob("*/meta.json")), "a failed run left something that looks like a store"


def test_reference_cache_of_other_data_is_refused(ranks, tmp_path):
    flags = ["--reference-cache", str(tmp_path / "reference"), "--train-iters", "1"]
    ranks(2)(jobs.train, flags, pair_cache_dir=str(tmp_path))
    messages = ranks(2)(refusal, [*flags, "--max-response-length", "24"], pair_cache_dir=str(tmp_path))
    assert_refused(messages, r"reference/train are of something else:\s+max_response_length: None there, 24 here\nName")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--rotary-base", "500000"], "rotary_base: 10000 there, 500000 here"),
        (["--norm-epsilon", "1e-3"], "layernorm_epsilon: 1e-05 there, 0.001 here"),
        (["--seed", "7"], r"weights: \w+ there, \w+ here"),
    ],
    ids=lambda value: value[0],
)
def test_reference_cache_of_another_model_is_refused(ranks, tmp_path, change, named):
    flags = ["--reference-cache", str(tmp_path / "reference"), "--train-iters", "1"]
    ranks(2)(jobs.train, flags, pair_cache_dir=str(tmp_path))
    messages = ranks(2)(refusal, [*flags, *change], pair_cache_dir=str(tmp_path))
    assert_refused(messages, rf"reference/train are of something else:\s+{named}\nName")


def assert_refused(messages, expected):
    assert len(set(messages)) == 1, messages
    assert re.search(expected, messages[0], re.DOTALL), messages[0]


def test_torchrun_ends_with_one_message(tmp_path):
    """The whole way: launcher, two ranks, exit code, no traceback of ours, no hang."""
    bad = write(tmp_path / "bad.jsonl", GOOD_ROW, "not json\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE)]
    flags = ["--pair-data", bad, "--pair-cache-dir", str(tmp_path / "cache"), *model_flags()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode != 0
    assert ended.stderr.count("bad.jsonl, line 2") == 1, ended.stderr
    assert "error: " in ended.stderr
    assert "UserError" not in ended.stderr, "a traceback of ours was shown"


def model_flags() -> list[str]:
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 256 --lr 1e-3 --train-iters 1 "
        "--pairs-per-step 2 --tokenizer-type SentencePieceTokenizer --tokenizer-model"
    )
    return [*flags.split(), str(DATA / "tokenizer.model")]  # the path may hold spaces
