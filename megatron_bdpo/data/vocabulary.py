"""What a tokenizer is: bytes that differ where it would make other tokens of some text, wherever its files lie."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_bdpo.data.messages import Message


class MegatronTextTokenizer(Protocol):
    """What we use of the object that ``megatron.core.tokenizers.utils.build_tokenizer`` returns."""

    library: str
    chat_template: str | None
    vocab_size: int

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: list[int]) -> str: ...

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any: ...


def vocabulary(tokenizer: MegatronTextTokenizer, library: str) -> bytes:
    """Stands for vocabulary, merges and special tokens; ``library`` is a key of ``VOCABULARY_OF``."""
    return VOCABULARY_OF[library](library_object(tokenizer))


def library_object(tokenizer: MegatronTextTokenizer) -> Any:
    """Megatron's wrapper of the library's tokenizer: the only place that knows where it is kept."""
    return tokenizer._tokenizer  # type: ignore[attr-defined]


def _hugging_face_vocabulary(wrapper: Any) -> bytes:
    tokenizer = wrapper.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        for last_call in ("padding", "truncation"):  # how a text was last encoded, not what the tokenizer is
            model.pop(last_call, None)
    else:  # a tokenizer written in Python: its merges are in its files only
        with tempfile.TemporaryDirectory() as directory:
            files = [Path(name) for name in tokenizer.save_vocabulary(directory)]
            contents = {file.name: file.read_bytes().hex() for file in files}
        model = [type(tokenizer).__name__, tokenizer.get_vocab(), contents]
    return json.dumps([model, bool(wrapper.include_special_tokens)], sort_keys=True).encode()


def _sentencepiece_vocabulary(wrapper: Any) -> bytes:
    settings = [wrapper.special_token_to_id, wrapper.legacy, wrapper.ignore_extra_whitespaces]
    return wrapper.tokenizer.serialized_model_proto() + json.dumps(settings, sort_keys=True).encode()


def _tiktoken_vocabulary(wrapper: Any) -> bytes:
    ranks = sorted((rank, token.hex()) for token, rank in wrapper.token2id.items())
    return json.dumps([ranks, wrapper.special_tokens, wrapper.tokenizer._pat_str]).encode()


def _null_vocabulary(wrapper: Any) -> bytes:
    return json.dumps([wrapper.vocab_size, wrapper.eod]).encode()


#: Library name in Megatron -> bytes that stand for its vocabulary, merges and special tokens.
VOCABULARY_OF: dict[str, Callable[[Any], bytes]] = {
    "huggingface": _hugging_face_vocabulary,
    "megatron": _hugging_face_vocabulary,
    "sentencepiece": _sentencepiece_vocabulary,
    "tiktoken": _tiktoken_vocabulary,
    "null-text": _null_vocabulary,
}
