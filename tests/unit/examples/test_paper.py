"""The paper's recipe: its data from rows of PKU-SafeRLHF's schema, and every model with every loss in a dry run."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.training.test_dry_run import LLAMA_8B, QWEN2_7B, report

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "examples" / "paper"

LLAMA_2_7B = {name: value for name, value in LLAMA_8B.items() if name not in ("rope_scaling", "rope_theta")} | {
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
}
_NOT_MISTRALS = ("rope_scaling", "mlp_bias", "attention_bias", "pretraining_tp")
MISTRAL_7B = {name: value for name, value in LLAMA_8B.items() if name not in _NOT_MISTRALS} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "vocab_size": 32768,
}


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", PAPER / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(query: int, safe: tuple[bool, bool], better: int = 0, **changed) -> dict:
    """A row with all columns of the data set."""
    harms = {"Violence": False, "Privacy Violation": False}
    return {
        "prompt": f"Query number {query}, please?",
        "response_0": f"Answer zero of {query} is here.",
        "response_1": f"Answer one of {query} is there.",
        "prompt_source": "made up",
        "response_0_source": "made up",
        "response_1_source": "made up",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "response_0_harm_category": harms,
        "response_1_harm_category": harms,
        "response_0_severity_level": 0 if safe[0] else 2,
        "response_1_severity_level": 0 if safe[1] else 2,
        "better_response_id": better,
        "safer_response_id": 0 if safe[0] else 1,
        "response_0_sha256": "00",
        "response_1_sha256": "11",
    } | changed


ROWS = [
    *(row(query, (query % 2 == 0, query % 2 == 1), better=query % 3 % 2) for query in range(30)),
    *(row(query, (True, True), better=query % 2) for query in range(20, 60)),  # 20 to 29 have rows of both kinds
    *(row(query, (False, False)) for query in range(60, 65)),
    row(70, (True, False), response_1="Answer zero of 70 is here."),
    row(71, (True, False), response_1=" "),
]
WANTED = ["--unsafe", "20", "--heldout-unsafe", "5", "--safe", "16", "--heldout-safe", "4"]


def prepared(prepare, directory: Path, rows: list[dict] = ROWS, flags: list[str] = WANTED) -> tuple[list, list]:
    source = directory / "rows.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert prepare.main(["--source", str(source), "--output", str(directory), *flags]) == 0
    return tuple(
        [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )


def test_pairs_of_both_kinds(prepare, tmp_path, capsys):
    train, held_out = prepared(prepare, tmp_path)
    assert [Counter(pair["rejected_safe"] for pair in part) for part in (train, held_out)] == [
        {False: 20, True: 16},
        {False: 5, True: 4},
    ]
    queries = [pair["prompt"][0]["content"] for pair in train + held_out]
    assert len(set(queries)) == len(queries)
    originals = {(each["prompt"], each["is_response_0_safe"] != each["is_response_1_safe"]): each for each in ROWS}
    for pair in train + held_out:
        assert pair["chosen_safe"]
        original = originals[pair["prompt"][0]["content"], not pair["rejected_safe"]]
        if pair["rejected_safe"]:
            expected_chosen = original["better_response_id"]
        else:
            expected_chosen = 0 if original["is_response_0_safe"] else 1
        assert pair["chosen"] == [{"role": "assistant", "content": original[f"response_{expected_chosen}"]}]
        assert pair["rejected"] == [{"role": "assistant", "content": original[f"response_{1 - expected_chosen}"]}]
    said = capsys.readouterr().out
    assert "77 rows: 40 safe, 30 unsafe, 5 both responses unsafe, 1 equal responses, 1 an empty text" in said


def test_the_draw_is_of_the_rows_and_the_seed(prepare, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = prepared(prepare, tmp_path / "a")
    assert prepared(prepare, tmp_path / "b", ROWS[::-1]) == first
    assert prepared(prepare, tmp_path / "b", ROWS, [*WANTED, "--seed", "1"]) != first


@pytest.mark.parametrize(
    ("rows", "flags", "expected"),
    [
        (ROWS, ["--unsafe", "31"], "531 unsafe queries are wanted (31 to train on, 500 held out), but there are 30"),
        ([row(1, (True, False), prompt=None)], [], "rows.jsonl, row 1: the column prompt should be str, found None"),
        ([row(1, (True, True), better=2)], [], "better_response_id should be 0 or 1, found 2"),
        ([{"prompt": "p", "chosen": "c"}], [], "the column response_0 should be str"),
    ],
)
def test_what_cannot_be_prepared_is_refused(prepare, tmp_path, capsys, rows, flags, expected):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert prepare.main(["--source", str(source), "--output", str(tmp_path / "out"), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


MODELS = {"qwen2_7b": QWEN2_7B, "mistral_7b": MISTRAL_7B, "vicuna_7b": LLAMA_2_7B}
LOSSES = {
    "dpo": "dpo, beta 0.1,",
    "bw": "bdpo, beta 0.1, bdpo_temperature auto, bdpo_weights True, bdpo_scale False,",
    "sf": "bdpo, beta 0.1, bdpo_temperature auto, bdpo_weights False, bdpo_scale True,",
    "bdpo": "bdpo, beta 0.1, bdpo_temperature auto, bdpo_weights True, bdpo_scale True,",
    "cpo": "cpo, beta 0.1, nll_weight 1.0",
    "simpo": "simpo, beta 2.0, simpo_gamma 0.5,",
    "safedpo": "safedpo, beta 0.1, safedpo_delta 10.0,",
}


@pytest.mark.parametrize(
    ("model", "loss"), [*(("qwen2_7b", loss) for loss in LOSSES), ("mistral_7b", "bdpo"), ("vicuna_7b", "bdpo")]
)
def test_every_run_passes_a_dry_run(prepare, ranks, tmp_path, qwen_like, llama_like, model, loss):
    """With the real models' configurations; their tokenizers are stood in for, Vicuna's by one without a template."""
    prepared(prepare, tmp_path)
    directory = tmp_path / "model"
    shutil.copytree(qwen_like if model == "qwen2_7b" else llama_like, directory)
    if model == "vicuna_7b":
        (directory / "chat_template.jinja").unlink(missing_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[model]))
    recipes = [PAPER / "common.yaml", PAPER / f"{model}.yaml", PAPER / "losses" / f"{loss}.yaml"]
    flags = [word for recipe in recipes for word in ("--recipe", str(recipe))]
    environment = {"PAPER_DATA": str(tmp_path), "RUN_DIR": str(tmp_path / "run"), "HF_MODEL": str(directory)}
    printed = ranks(1)(report, [*flags, "--dry-run", "8", "--pairs-per-step", "4"], environment)[0]
    assert printed.endswith("ended: 0"), printed
    assert f"loss: {LOSSES[loss]}" in printed
    assert "36 kept of 36 rows" in printed and "9 kept of 9 rows" in printed
    assert "layout: 2 tensor x 4 data" in printed


def test_vicunas_template_is_its_conversation_format():
    """As FastChat's documentation of the weights gives it, two turns."""
    import jinja2
    import yaml

    template = yaml.safe_load((PAPER / "vicuna_7b.yaml").read_text())["chat-template"]
    turns = [("user", "Hello!"), ("assistant", "Hi!"), ("user", "How are you?")]
    rendered = jinja2.Template(template).render(
        messages=[{"role": role, "content": content} for role, content in turns],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )
    assert rendered == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hello! ASSISTANT: Hi!</s> USER: How are you? "
        "ASSISTANT:"
    )
