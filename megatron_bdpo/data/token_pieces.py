"""Token ids as the pieces of text that they stand for, to be looked at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_bdpo.data.vocabulary import MegatronTextTokenizer, library_object


class TokenPieces:
    """What each token of a tokenizer adds to a text."""

    def __init__(self, tokenizer: MegatronTextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = _names_of_controls(library_object(tokenizer))
        # A token is decoded behind another one: the libraries take a space away from the beginning of a text.
        self._before = list(tokenizer.tokenize("1"))[-1:]
        self._skip = len(tokenizer.detokenize(self._before))

    def of(self, ids: Iterable[int]) -> list[str]:
        """A piece for each token: its text, the name of a control token, or ``<ID>`` where it has no text of its own,
        as a part of a character."""
        return [self._names.get(token) or self._text(token) for token in ids]

    def _text(self, token: int) -> str:
        if token >= self._tokenizer.vocab_size:
            return f"<{token}>"
        text = self._tokenizer.detokenize([*self._before, token])[self._skip :]
        return text if text and "\ufffd" not in text else f"<{token}>"


def _names_of_controls(wrapper: Any) -> dict[int, str]:
    """Of Hugging Face and SentencePiece tokenizers; others show numbers."""
    library: Any = getattr(wrapper, "tokenizer", None)
    if added := getattr(library, "added_tokens_decoder", None):
        return {index: str(token) for index, token in added.items()}
    if hasattr(library, "is_control"):
        return {i: library.id_to_piece(i) for i in range(library.get_piece_size()) if library.is_control(i)}
    return {}
