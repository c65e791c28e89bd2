"""The model's own tokenizer and chat template come along: into the run without a flag, and out with the export."""

from __future__ import annotations

import json

import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.jobs import train
from tests.harness.tiny_models import make_model, save_tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")


def test_messages_are_rendered_by_the_models_template(ranks, tmp_path):
    model = make_model("llama", tmp_path)
    save_tokenizer(model)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "chosen": [{"role": "assistant", "content": "Gladly."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for number in range(8)
    ]
    data, saved, cache = tmp_path / "pairs.jsonl", tmp_path / "saved", tmp_path / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"tokenizer_type": None, "tokenizer_model": None, "pairs_per_step": 4, "train_iters": 1, "max_pairs": None}
    flags = ["--hf-model", str(model), "--save-hf", str(saved), "--pair-data", str(data)]
    ranks(1)(train, flags, pair_cache_dir=str(cache), **job)
    (meta,) = cache.glob("*/meta.json")
    pair = PairStore.open(meta.parent).pair(0)
    exported = transformers.AutoTokenizer.from_pretrained(saved)
    assert exported.decode(pair.prompt) == "<|user|>Question 0?<|end|><|assistant|>"
    assert exported.decode(pair.chosen) == "Gladly.<|end|>"
    both = rows[0]["prompt"] + rows[0]["chosen"]
    assert exported.apply_chat_template(both, tokenize=False) == "<|user|>Question 0?<|end|><|assistant|>Gladly.<|end|>"
