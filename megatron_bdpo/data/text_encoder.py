"""Texts to token ids, quickly: what several texts begin with is tokenized once, by the tokenizer's own rules."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from typing import Any, NamedTuple

from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.vocabulary import MegatronTextTokenizer, library_object
from megatron_bdpo.errors import UserError


class Mark(NamedTuple):
    """A special token at which the tokenizer cuts every text, so that both sides are tokenized on their own."""

    text: str
    token: int


type Known = dict[str, list[int]]
"""Texts that were encoded, with their tokens."""


class TextEncoder:
    """Encodes texts with one of Megatron's tokenizers, without what its library adds to every text.

    Attributes:
        before, after: tokens that the library adds to every text.

    Raises:
        UserError: the library adds tokens elsewhere than before and after a text.
    """

    def __init__(self, tokenizer: MegatronTextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._fast = _fast_backend(tokenizer)
        self.before, self.after = _tokens_added_by_library(tokenizer)
        self._last_marks: dict[str, Mark | None] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            RowProblem: the tokenizer cannot encode it.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts; see :meth:`encode`."""
        try:
            if self._fast is None:
                encoded = [self._tokenizer.tokenize(text) if text else None for text in texts]
            else:
                encoded = [each.ids for each in self._fast.encode_batch_fast(texts)]
        except (ValueError, TypeError) as error:  # for example a word given to NullTokenizer
            raise RowProblem(ProblemKind.NOT_ENCODABLE, f"{type(error).__name__}: {error}") from error
        return [
            list(ids[len(self.before) : len(ids) - len(self.after)]) if text and ids is not None else []
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def encode_after(
        self, texts: list[str], common: str, mark: Mark | None, known: Known | None = None
    ) -> list[list[int]]:
        """Token ids of texts that all begin with ``common``, as :meth:`encode` gives them.

        Args:
            mark: of :meth:`last_mark`. What stands up to its last place in ``common`` is tokenized once.
            known: what is in it is not tokenized again; what is not is added.
        """
        known = {} if known is None else known
        cut = common.rfind(mark.text) if mark else -1
        if mark is None or cut <= 0:
            return self._encode_new(texts, known)
        # With the mark in front: a tokenizer treats the beginning of a text in its own way.
        head, *tails = self._encode_new([common[: cut + len(mark.text)], *(text[cut:] for text in texts)], known)
        if head[-1:] != [mark.token] or any(tail[:1] != [mark.token] for tail in tails):
            return self._encode_new(texts, known)
        return [head + tail[1:] for tail in tails]

    def _encode_new(self, texts: list[str], known: Known) -> list[list[int]]:
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, self.encode_all(new), strict=True))
        return [known[text] for text in texts]

    def last_mark(self, text: str) -> Mark | None:
        """The last special token in a text at which the tokenizer cuts, whatever stands around it; None: none."""
        if text not in self._last_marks:
            found = [(text.rfind(mark.text), mark) for mark in self._marks]
            at, mark = max(found, default=(-1, None), key=lambda each: each[0])
            self._last_marks = {text: mark if at >= 0 else None}  # it is asked for the same text again and again
        return self._last_marks[text]

    def places(self, text: str, cuts: list[int]) -> list[int]:
        """How many tokens of ``encode(text)`` come before each of some characters.

        Raises:
            RowProblem: a token begins before such a character and ends after it.
        """
        if self._fast is None:
            whole, heads = self.encode(text), [self.encode(text[:cut]) for cut in cuts]
            merged = next((cut for cut, head in zip(cuts, heads, strict=True) if whole[: len(head)] != head), None)
            places = [len(head) for head in heads]
        else:
            offsets = self._fast.encode(text).offsets
            offsets = offsets[len(self.before) : len(offsets) - len(self.after)]
            starts = [start for start, _ in offsets]
            places = [bisect.bisect_left(starts, cut) for cut in cuts]
            straddles = [place > 0 and offsets[place - 1][1] > cut for place, cut in zip(places, cuts, strict=True)]
            merged = next(itertools.compress(cuts, straddles), None)
        if merged is not None:
            raise RowProblem(
                ProblemKind.BOUNDARY_MERGE,
                f"one token holds the end of a turn and what follows it: {text[max(0, merged - 20) : merged + 20]!r}",
            )
        return places

    def spelled_out(self, value: Any) -> set[str]:
        """Control tokens that stand as text in a row's strings: the tokenizer makes real ones of them.

        Only Hugging Face tokenizers do; SentencePiece reads them as text, and tiktoken refuses them.

        Args:
            value: a string, or messages.
        """
        if isinstance(value, str):
            return set(self._control.findall(value)) if self._control else set()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {token for each in inner for token in self.spelled_out(each)}

    @functools.cached_property
    def _control(self) -> re.Pattern[str] | None:
        added = self._fast.get_added_tokens_decoder().values() if self._fast is not None else ()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @functools.cached_property
    def _marks(self) -> list[Mark]:
        if self._fast is None:
            return []
        added = {token.content: (token, index) for index, token in self._fast.get_added_tokens_decoder().items()}
        return [
            Mark(text, index)
            for text, (token, index) in added.items()
            # One that is part of another, or needs a word's edge, does not always cut; nor one in normalized text.
            if token.special
            and not (token.normalized or token.single_word)
            and not any(text in other and text != other for other in added)
        ]


def _fast_backend(tokenizer: MegatronTextTokenizer) -> Any:
    """The Rust object of a Hugging Face tokenizer, which encodes as the tokenizer itself does; else None."""
    wrapper = getattr(tokenizer, "_tokenizer", None)
    if not getattr(wrapper, "include_special_tokens", False):
        return None
    outer = library_object(tokenizer).tokenizer
    backend = getattr(outer, "backend_tokenizer", None)
    if backend is None:
        return None
    outer("a")  # which sets its padding and truncation to none
    probe = "a b\n\nc  é <|im_start|>"
    if not hasattr(backend, "encode_batch_fast"):  # before tokenizers 0.20
        return None
    return backend if backend.encode_batch_fast([probe])[0].ids == list(tokenizer.tokenize(probe)) else None


def _tokens_added_by_library(tokenizer: MegatronTextTokenizer) -> tuple[list[int], list[int]]:
    """What the library puts before and after every text by itself. Only Hugging Face tokenizers do that."""
    try:
        added = list(tokenizer.tokenize(""))
    except ValueError:  # NullTokenizer splits numbers
        return [], []
    if not added:
        return [], []
    probe = list(tokenizer.tokenize("a"))
    before = sum(1 for _ in itertools.takewhile(lambda ids: ids[0] == ids[1], zip(added, probe, strict=False)))
    after = added[before:]
    if after and probe[-len(after) :] != after:
        raise UserError(f"The tokenizer adds the tokens {added} to every text, but not just before and after it.")
    return added[:before], after
