"""Comprehension of the pairs of a Hugging Face model: what a short script of transformers says; never another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bdpo.comprehension import mutual_information
from megatron_bdpo.training.reference.cache import Scores, open_scores
from tests.harness.jobs import score
from tests.harness.ranks import RankFailure
from tests.harness.tiny_models import TEMPLATE, load_model, make_model, save_tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

PROMPTS = ["Question?", "Why is the sky blue, and the grass green?", "", "A prompt that goes on.\n\nAnd on."]
ANSWERS = [("Gladly.", "No."), ("It scatters light.", "I"), ("Hello there!", "Go away."), ("Yes, and it ends.", "Yes")]

ROWS = {
    "strings": [{"prompt": p, "chosen": w, "rejected": r} for p, (w, r) in zip(PROMPTS, ANSWERS, strict=True)],
    "chat": [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, (chosen, rejected) in zip(PROMPTS, ANSWERS, strict=True)
    ],
}


# The script: nothing of ours ------------------------------------------------------------------------------------------


@torch.no_grad()
def script(directory: Path, rows: list[dict], chat: bool) -> dict[str, np.ndarray]:
    """[P, 2] of chosen, rejected: conditional and unconditional log-probs and numbers of tokens."""
    model, tokenizer = load_model(directory), transformers.AutoTokenizer.from_pretrained(directory)
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []

    def encode(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options) if chat else messages
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_prob(prompt, answer):
        log_probs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        return sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))

    opened = {"add_generation_prompt": True} if chat else {}
    empty = encode([{"role": "user", "content": ""}], **opened) if chat else start or [tokenizer.eos_token_id]
    found = {"conditional": [], "unconditional": [], "tokens": []}
    for row in rows:
        prompt = encode(row["prompt"], **opened)
        ends = [] if chat else [tokenizer.eos_token_id]
        answers = [encode(row["prompt"] + row[name])[len(prompt) :] + ends for name in ("chosen", "rejected")]
        prompt = prompt if chat else (start + prompt or [tokenizer.eos_token_id])
        found["conditional"].append([log_prob(prompt, answer) for answer in answers])
        found["unconditional"].append([log_prob(empty, answer) for answer in answers])
        found["tokens"].append([len(answer) for answer in answers])
    return {name: np.array(values) for name, values in found.items()}


# ----------------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(ranks, model: Path, data: Path, cache: Path, *flags: str, world_size: int = 1) -> Scores:
    """The scores that a job of its own makes in ``cache``/scores."""
    job = {"tokenizer_type": None, "tokenizer_model": None, "max_pairs": None, "pairs_per_step": 2}
    flags = ("--hf-model", str(model), "--pair-data", str(data), "--reference-cache", str(cache / "scores"), *flags)
    (directory,) = ranks(world_size)(score, list(flags), pair_cache_dir=str(cache), **job)[0]
    return open_scores(directory)


@pytest.mark.parametrize(
    ("form", "special_tokens", "world_size", "flags"),
    [
        ("strings", {}, 1, []),
        ("strings", {"bos_token": "<|begin|>"}, 1, []),
        ("chat", {}, 1, []),
        ("chat", {}, 4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    ],
    ids=["strings", "strings with BOS", "chat", "chat TP2 PP2"],
)
def test_comprehension_is_that_of_a_script(ranks, tmp_path, form, special_tokens, world_size, flags):
    model = make_model("llama", tmp_path)
    save_tokenizer(model, **special_tokens)
    data = write_rows(tmp_path / "pairs.jsonl", ROWS[form])
    found = scored(ranks, model, data, tmp_path / "cache", *flags, world_size=world_size)
    expected = script(model, ROWS[form], chat=form == "chat")
    assert found.tokens.tolist() == expected["tokens"].tolist(), "all tokens, the first one and the end too"
    for kind in ("conditional", "unconditional"):
        assert getattr(found, kind) / found.tokens == pytest.approx(expected[kind] / found.tokens, abs=1e-5), kind
    information = mutual_information(*map(torch.from_numpy, (found.conditional, found.unconditional, found.tokens)))
    expected_information = (expected["conditional"] - expected["unconditional"]) / expected["tokens"]
    assert information.numpy() == pytest.approx(expected_information, abs=1e-5)
    assert np.abs(expected_information).max() > 0.1, "prompts tell nothing: nothing is compared"


# Scores of something else ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(ranks, tmp_path_factory) -> Path:
    """A directory with a model, data and the scores of both."""
    directory = tmp_path_factory.mktemp("first")
    model = make_model("llama", directory)
    save_tokenizer(model)
    data = write_rows(directory / "pairs.jsonl", ROWS["chat"])
    scored(ranks, model, data, directory)
    return directory


def other_data(copy: Path) -> None:
    path = copy / "pairs.jsonl"
    path.write_text(path.read_text().replace("blue", "grey"))


def other_weight(copy: Path) -> None:
    """The last bit of one element."""
    (file,) = copy.glob("llama/*.safetensors")
    tensors = load_file(file)
    norm = tensors["model.norm.weight"]
    norm[3] = torch.nextafter(norm[3], norm[3] + 1)
    save_file(tensors, file, {"format": "pt"})


def other_template(copy: Path) -> None:
    save_tokenizer(copy / "llama", "Be brief." + TEMPLATE)


def other_tokenizer(copy: Path) -> None:
    save_tokenizer(copy / "llama", unk_token="<|unknown|>")


def other_norm(copy: Path) -> None:
    path = copy / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    [
        (other_data, [], r"data: \['\w+'\] there, \['\w+'\] here"),
        (other_weight, [], r"weights: \w+ there, \w+ here"),
        (other_template, [], r"chat_template: .* there, .* here\n  empty_prompt: .*"),
        (other_tokenizer, [], r"tokenizer: \w+ there, \w+ here\n  empty_prompt: .*"),
        (other_norm, [], r"layernorm_epsilon: 0.0001 there, 1e-05 here"),
        (None, ["--max-prompt-length", "9"], r"max_prompt_length: None there, 9 here"),
        (None, ["--max-response-length", "4"], r"max_response_length: None there, 4 here"),
        (None, ["--log-probs", "plain"], r"log_probs: fused there, plain here"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_scores_of_something_else_are_refused_by_name(ranks, first, tmp_path, change, flags, named):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    if change is not None:
        change(copy)
    with pytest.raises(RankFailure, match=rf"scores/train are of something else:\n  {named}\nName another"):
        scored(ranks, copy / "llama", copy / "pairs.jsonl", copy, *flags)


def test_the_same_elsewhere_is_the_same(ranks, first, tmp_path):
    """Where data, model and scores lie does not matter."""
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    found = scored(ranks, copy / "llama", copy / "pairs.jsonl", copy)
    assert len(found.manifest["jobs"]) == 1, "scored again"
