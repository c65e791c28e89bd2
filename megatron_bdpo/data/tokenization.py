"""Preference records to token ids, with Megatron's own tokenizers.

The rules, in the order in which they apply:

1. Prompt and response are tokenized *jointly* and then split, because this is the text the model sees. The prompt's
   own tokens must be a prefix of both joint encodings; a pair in which a token straddles the boundary is not used.
2. String records begin with one start token if the tokenizer has one: what its library puts in front by itself, else
   BOS. It is never doubled, whether the library or the text brings it. An empty prompt without BOS starts with EOD,
   because the first response token has to be predicted from something.
3. The responses of string records end with EOD exactly once.
4. Chat records are what the chat template makes of them. The prompt is rendered with the generation prompt, the whole
   conversation without; the former's text must be a prefix of the latter's. Whatever the template puts after the
   response belongs to the response. EOD is added only when the template puts nothing but white space there.
5. A Hugging Face template writes BOS itself where the model wants it, so it alone decides. The other libraries cannot
   express BOS in a template: there rule 2 holds for chat records too.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.chat_template import ChatTemplate
from megatron_bdpo.data.records import USER, Message, PreferenceRecord, ProblemKind, RowProblem
from megatron_bdpo.data.vocabulary import VOCABULARY_OF, MegatronTextTokenizer, vocabulary
from megatron_bdpo.errors import UserError

type TokenArray = npt.NDArray[np.int32]

# A change of the rules above makes other tokens of the same data: raise this number, and stored tokens are renewed.
RULES_VERSION = 1


class PairTokens(NamedTuple):
    """Token ids of one pair; each is int32 [length]. ``prompt`` includes the start token, the responses their end."""

    prompt: TokenArray
    chosen: TokenArray
    rejected: TokenArray


class PairTokenizer:
    """Encodes records by the rules in this module's docstring.

    Args:
        tokenizer: Megatron's tokenizer, from its ``build_tokenizer(args)``.

    Raises:
        UserError: the tokenizer is of a kind that cannot be used here, or it has no end-of-document token.
    """

    def __init__(self, tokenizer: MegatronTextTokenizer) -> None:
        library = getattr(tokenizer, "library", type(tokenizer).__name__)
        if library not in VOCABULARY_OF:
            raise UserError(
                f"--tokenizer-type: tokenizers of kind '{library}' cannot tokenize preference pairs. Use "
                "HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer."
            )
        self._tokenizer = tokenizer
        self._library = library
        self._template = ChatTemplate(tokenizer, library)
        self._added_before, self._added_after = _tokens_added_by_library(tokenizer)
        end = _special_id(tokenizer, "eod")
        if end is None:
            raise UserError("The tokenizer has no EOS (end-of-document) token, so no response could end. Define one.")
        bos = _special_id(tokenizer, "bos")
        self._end = end
        # Rule 2. More than one token only where the library itself puts more than one in front.
        self._start = self._added_before or ([] if bos is None else [bos])

    def encode(self, record: PreferenceRecord) -> PairTokens:
        """Token ids of a record, not truncated.

        Raises:
            RowProblem: the record cannot be tokenized faithfully.
            UserError: a chat record, and the tokenizer has no chat template or one that cannot be used at all.
        """
        prompt_text, chosen_text, rejected_text = (
            self._template.render(record) if record.is_chat else _joint_texts(record)
        )
        prompt = self._ids(prompt_text, record.is_chat)
        chosen = _after(prompt, self._ids(chosen_text, record.is_chat), "chosen")
        rejected = _after(prompt, self._ids(rejected_text, record.is_chat), "rejected")
        end = [self._end] if not record.is_chat or self._template.leaves_turn_open else []
        chosen, rejected = _ended(chosen, end, "chosen"), _ended(rejected, end, "rejected")
        if chosen == rejected:
            raise RowProblem(ProblemKind.IDENTICAL_TOKENS, "chosen and rejected give the same tokens")
        return PairTokens(self._started(prompt, record.is_chat), _int32(chosen), _int32(rejected))

    def encode_prompt(self, prompt: str | list[Message]) -> TokenArray:
        """Token ids of a prompt alone, int32 [length >= 1]: those that :meth:`encode` gives it before a response.

        Raises:
            RowProblem: it cannot be tokenized.
            UserError: it is made of messages, and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return self._started(self._ids(prompt, chat=False), chat=False)
        text = self._template.apply(prompt, add_generation_prompt=True)
        return self._started(self._ids(text, chat=True), chat=True)

    def ends(self, *, chat: bool) -> list[list[int]]:
        """What a response ends with, each as token ids: EOD; in chats also what the template puts after a response.

        White space at the template's end is not waited for: it is the same after every response.
        """
        ends = [[self._end]]
        if chat:
            text, after = self._template.short_conversation
            before = self._ids(text[: len(text) - len(after)], chat=True)
            whole = self._ids(text.rstrip(), chat=True)
            if whole[: len(before)] == before:
                ends.append(whole[len(before) :])
        return [end for index, end in enumerate(ends) if end and end not in ends[:index]]

    def text(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens where the library leaves them out.

        Entries that a model has beyond its tokenizer's have none.
        """
        return self._tokenizer.detokenize([token for token in ids if token < self._tokenizer.vocab_size])

    def truncate(self, pair: PairTokens, max_prompt_tokens: int | None, max_response_tokens: int | None) -> PairTokens:
        """Keep the prompt's end, with its start token, and the beginning of each response; None is no limit.

        A response that is cut loses its end token: the model shall not learn to stop there.

        Raises:
            RowProblem: the responses are identical after the cut.
        """
        prompt, chosen, rejected = pair
        if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
            starts_so = prompt[: len(self._start)].tolist() == self._start
            start = prompt[: min(len(self._start), max_prompt_tokens - 1)] if starts_so else prompt[:0]
            prompt = np.concatenate([start, prompt[len(prompt) - (max_prompt_tokens - len(start)) :]])
        if max_response_tokens is not None:
            chosen, rejected = chosen[:max_response_tokens], rejected[:max_response_tokens]
            if np.array_equal(chosen, rejected):
                raise RowProblem(
                    ProblemKind.IDENTICAL_AFTER_TRUNCATION,
                    f"the first {max_response_tokens} tokens of chosen and rejected are the same",
                )
        return PairTokens(prompt, chosen, rejected)

    def empty_prompt(self, chat: bool) -> TokenArray:
        """The prompt that says nothing, int32 [length >= 1]: what the unconditional log-probability is conditioned on.

        The start token (EOD where there is none) for string records; the template with one empty user turn, opened for
        the assistant's answer, for chat records.
        """
        if not chat:
            return self._started([], chat=False)
        try:
            text = self._template.apply([{"role": USER, "content": ""}], add_generation_prompt=True)
        except RowProblem as problem:
            raise UserError(
                "--chat-template: the template cannot render an empty user turn, which is the prompt of the "
                f"unconditional log-probability ({problem.detail})."
            ) from problem
        return self._started(self._ids(text, chat=True), chat=True)

    def identity(self) -> str:
        """Hex SHA-256 of everything that decides which tokens a record becomes, wherever the tokenizer's files lie."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, str | None]:
        """The same by name: a digest of vocabulary and rules, and the chat template itself."""
        return {"tokenizer": self._without_template, "chat_template": self._tokenizer.chat_template}

    @functools.cached_property
    def _without_template(self) -> str:
        digest = hashlib.sha256(vocabulary(self._tokenizer, self._library))
        rules = {
            "rules_version": RULES_VERSION,
            "library": self._library,
            "start": self._start,
            "end": self._end,
            "added": [self._added_before, self._added_after],
        }
        digest.update(json.dumps(rules, sort_keys=True).encode())
        return digest.hexdigest()

    def _ids(self, text: str, chat: bool) -> list[int]:
        """Tokens of the text without what the library adds and without the start token: that is `_started`'s part."""
        if not text:
            return []
        try:
            ids = list(self._tokenizer.tokenize(text))
        except (ValueError, TypeError) as error:  # for example a word given to NullTokenizer
            raise RowProblem(ProblemKind.NOT_ENCODABLE, f"{type(error).__name__}: {error}") from error
        ids = ids[len(self._added_before) : len(ids) - len(self._added_after)]
        spelled_out = not (chat and self._template.knows_bos) and ids[: len(self._start)] == self._start
        return ids[len(self._start) :] if spelled_out else ids

    def _started(self, prompt: list[int], chat: bool) -> TokenArray:
        """The prompt with its start token: rules 2 and 5."""
        if prompt and chat and self._template.knows_bos:
            return _int32(prompt)
        return _int32((self._start or ([] if prompt else [self._end])) + prompt)


def _int32(ids: list[int]) -> TokenArray:
    return np.array(ids, dtype=np.int32)


def _joint_texts(record: PreferenceRecord) -> tuple[str, str, str]:
    """Texts of the prompt and of the prompt with either response."""
    assert isinstance(record.prompt, str) and isinstance(record.chosen, str) and isinstance(record.rejected, str)
    return record.prompt, record.prompt + record.chosen, record.prompt + record.rejected


def _after(prompt: list[int], joint: list[int], name: str) -> list[int]:
    """The response's tokens of a joint encoding: rule 1."""
    if joint[: len(prompt)] != prompt:
        raise RowProblem(
            ProblemKind.BOUNDARY_MERGE,
            f"the prompt's last token and the first one of {name} become one; end the prompt before the white space "
            "or start the response with it",
        )
    return joint[len(prompt) :]


def _ended(response: list[int], end: list[int], name: str) -> list[int]:
    """The response with its end token, exactly once: rules 3 and 4."""
    text_only = response[:-1] if end and response[-1:] == end else response
    if not text_only:
        raise RowProblem(ProblemKind.EMPTY_RESPONSE, f"{name} has no tokens")
    return text_only + end


def _special_id(tokenizer: object, name: str) -> int | None:
    """Id of a special token, None where there is none; the libraries say so by -1, by None or by raising."""
    try:
        token_id = getattr(tokenizer, name)
    except (AttributeError, NameError):
        return None
    return None if token_id is None or token_id < 0 else int(token_id)


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
