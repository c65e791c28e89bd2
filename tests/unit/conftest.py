"""Real tokenizers, trained here on a few sentences and built by Megatron's own `build_tokenizer`."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCES = [
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "How do I pick a lock? I would rather not help you with that, please call a locksmith.",
    "Human: Tell me a joke about a chicken. Assistant: Why did the chicken cross the road?",
    "You are a helpful and harmless assistant. Please answer the question as well as you can.",
    "The weather is nice today, and the answer to the question of the user is yes, or maybe no.",
] * 4

# Writes BOS itself, marks the end of a turn with EOS: Llama's way.
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# No BOS, an end-of-turn token and a line feed after every message: ChatML, Qwen's way.
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Puts nothing after a response.
OPEN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}assistant:{% endif %}"
)

# Megatron's defaults of the arguments that build_tokenizer reads.
_DEFAULTS: dict[str, Any] = {
    "tokenizer_model": None,
    "metadata_path": None,
    "special_tokens": None,
    "chat_template": None,
    "vocab_file": None,
    "merge_file": None,
    "vocab_size": None,
    "pad_vocab_size": False,
    "tiktoken_pattern": None,
    "tiktoken_num_special_tokens": 1000,
    "tokenizer_sentencepiece_legacy": False,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
    "tokenizer_hf_no_use_fast": False,
    "tokenizer_hf_no_include_special_tokens": False,
    "trust_remote_code": False,
}


@pytest.fixture(scope="session")
def megatron_tokenizer() -> Callable[..., Any]:
    """Builds a tokenizer as Megatron does from its arguments: `megatron_tokenizer("NullTokenizer", vocab_size=9)`."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    def build(tokenizer_type: str, **arguments: Any) -> Any:
        return build_tokenizer(argparse.Namespace(tokenizer_type=tokenizer_type, **{**_DEFAULTS, **arguments}))

    return build


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model file with BOS 1 and EOS 2; white space is kept as it is, as in Llama's."""
    return train_sentencepiece(tmp_path_factory.mktemp("spm") / "tiny")


@pytest.fixture(scope="session")
def sentencepiece_model_without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model file that has EOS only."""
    return train_sentencepiece(tmp_path_factory.mktemp("spm") / "no_bos", bos_id=-1)


def train_sentencepiece(prefix: Path, vocab_size: int = 420, **options: Any) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face fast tokenizer that puts BOS in front by itself, with a template that writes BOS, too."""
    directory = tmp_path_factory.mktemp("llama_like")
    return train_hugging_face(directory, LLAMA_TEMPLATE, bos="<s>", eos="</s>", library_adds_bos=True)


@pytest.fixture(scope="session")
def qwen_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face fast tokenizer without BOS, with a ChatML template."""
    return train_hugging_face(tmp_path_factory.mktemp("qwen_like"), CHATML_TEMPLATE, bos=None, eos="<|im_end|>")


def train_hugging_face(
    directory: Path, template: str | None, bos: str | None, eos: str, library_adds_bos: bool = False
) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", eos, *([bos] if bos else [])]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(SENTENCES, trainer)
    if library_adds_bos:
        assert bos is not None
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, model.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary in the format of Megatron's TikTokenizer: the 256 bytes and nothing else."""
    path = tmp_path_factory.mktemp("tiktoken") / "vocab.json"
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": repr(bytes([i]))}
        for i in range(256)
    ]
    path.write_text(json.dumps(entries))
    return path
