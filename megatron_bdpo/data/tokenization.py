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
6. Of a response of several turns only what the assistant says is scored, with what the template ends its turns with;
   the user's turns and what tools answer are context. The template marks its turns with ``{% generation %}``, or they
   are found by rendering the conversation up to each. In a dialogue of plain text HH-RLHF's markers tell them apart.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.chat_template import ChatTemplate, Spans, kept_context
from megatron_bdpo.data.messages import DOCUMENTS, TOOLS, USER, Message
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.start_tokens import StartTokens
from megatron_bdpo.data.text_encoder import Known, TextEncoder
from megatron_bdpo.data.turns import render_chat, render_strings
from megatron_bdpo.data.vocabulary import VOCABULARY_OF, MegatronTextTokenizer, vocabulary
from megatron_bdpo.errors import UserError

type TokenArray = npt.NDArray[np.int32]
type BoolArray = npt.NDArray[np.bool_]

type TrainOn = Literal["all-assistant", "last"]
"""Which of the assistant's turns in a response of several are scored."""

# A change of the rules above makes other tokens of the same data: raise this number, and stored tokens are renewed.
RULES_VERSION = 2


@dataclass(frozen=True, eq=False)
class PairTokens:
    """Token ids of one pair; each is int32 [length]. ``prompt`` includes the start token, the responses their end.

    A labelled answer is a pair of itself: ``rejected`` is the array that ``chosen`` is.
    """

    prompt: TokenArray
    chosen: TokenArray
    rejected: TokenArray
    chosen_scored: BoolArray | None = None
    """[length] which tokens of ``chosen`` are scored; None: all."""
    rejected_scored: BoolArray | None = None

    @property
    def parts(self) -> tuple[TokenArray, TokenArray, TokenArray]:
        """Prompt, chosen and rejected."""
        return self.prompt, self.chosen, self.rejected

    @property
    def scored(self) -> tuple[BoolArray | None, BoolArray | None]:
        """Which tokens of chosen and of rejected are scored; None: all."""
        return self.chosen_scored, self.rejected_scored

    @property
    def is_one_answer(self) -> bool:
        """It is a labelled answer."""
        return self.rejected is self.chosen


#: Settings that concern chats alone, by their names in ``PairTokenizer.settings``, and their flags.
FOR_CHATS = {
    "chat_template_kwargs": "--chat-template-kwargs",
    "unconditional_context": "--unconditional-prompt context",
}


class PairTokenizer:
    """Encodes records by the rules in this module's docstring.

    Args:
        tokenizer: Megatron's tokenizer, from its ``build_tokenizer(args)``.
        variables: what the chat template is given for every conversation; a row's own go before them.
        train_on: which of the assistant's turns in a response of several are scored.
        unconditional_context: the unconditional prompt keeps what is not about the prompt: the system's messages at the
            beginning and the tools.

    Raises:
        UserError: the tokenizer is of a kind that cannot be used here, or it has no end-of-document token.
    """

    def __init__(
        self,
        tokenizer: MegatronTextTokenizer,
        variables: Mapping[str, Any] | None = None,
        train_on: TrainOn = "all-assistant",
        *,
        unconditional_context: bool = False,
    ) -> None:
        library = getattr(tokenizer, "library", type(tokenizer).__name__)
        if library not in VOCABULARY_OF:
            raise UserError(
                f"--tokenizer-type: tokenizers of kind '{library}' cannot tokenize preference pairs. Use "
                "HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer."
            )
        self._tokenizer = tokenizer
        self._library = library
        self._encoder = TextEncoder(tokenizer)
        self.template = ChatTemplate(tokenizer, library, variables)
        self._train_on = train_on
        self._unconditional_context = unconditional_context
        end = _special_id(tokenizer, "eod")
        if end is None:
            raise UserError("The tokenizer has no EOS (end-of-document) token, so no response could end. Define one.")
        bos = _special_id(tokenizer, "bos")
        self._end = end
        # More than one token only where the library itself puts more than one in front.
        tokens = self._encoder.before or ([] if bos is None else [bos])
        self.start = StartTokens(tokens, end, self.template.knows_bos)
        """What prompts begin with."""

    def encode(self, record: PreferenceRecord, known: Known | None = None) -> PairTokens:
        """Token ids of a record, not truncated.

        Args:
            known: texts of records of the same row, which are not encoded again; this one's are added.

        Raises:
            RowProblem: the record cannot be tokenized faithfully.
            UserError: a chat record, and the tokenizer has no chat template or one that cannot be used at all.
        """
        is_chat = record.is_chat
        prompt_text, rendered = render_chat(self.template, record) if is_chat else render_strings(record)
        mark = self._encoder.last_mark(self.template.opening) if is_chat else None
        texts = [prompt_text, *(each.text for each in rendered)]
        prompt, *joint = (
            self.start.strip(ids, is_chat) for ids in self._encoder.encode_after(texts, prompt_text, mark, known)
        )
        end = [self._end] if not is_chat or self.template.leaves_turn_open else []
        responses: list[TokenArray] = []
        scored: list[BoolArray | None] = []
        for name, ids, each in zip(record.answers, joint, rendered, strict=True):
            response = _ended(_after(prompt, ids, name), end, name)
            responses.append(_int32(response))
            scored.append(None)
            if each.spans is not None:
                spans = each.spans[-1:] if self._train_on == "last" else each.spans
                added = len(response) - len(ids) + len(prompt)
                scored[-1] = _scored(self._encoder, each.text, spans, added, len(response), name)
        chosen, rejected = responses[0], responses[-1]  # of a labelled answer, the same
        if record.label is None and np.array_equal(chosen, rejected):
            raise RowProblem(ProblemKind.IDENTICAL_TOKENS, "chosen and rejected give the same tokens")
        return PairTokens(_int32(self.start.put(prompt, is_chat)), chosen, rejected, scored[0], scored[-1])

    def spelled_out(self, record: PreferenceRecord) -> set[str]:
        """Control tokens that the record's own texts spell out, which become real ones."""
        return self._encoder.spelled_out([record.prompt, *record.answers.values()])

    def _prompt(self, text: str, *, chat: bool) -> TokenArray:
        return _int32(self.start.put(self.start.strip(self._encoder.encode(text), chat), chat))

    def encode_prompt(self, prompt: str | list[Message], variables: Mapping[str, Any] | None = None) -> TokenArray:
        """Token ids of a prompt alone, int32 [length >= 1]: those that :meth:`encode` gives it before a response.

        Raises:
            RowProblem: it cannot be tokenized.
            UserError: it is made of messages, and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return self._prompt(prompt, chat=False)
        text = self.template.apply(prompt, variables or {}, add_generation_prompt=True)
        return self._prompt(text, chat=True)

    def ends(self, *, chat: bool) -> list[list[int]]:
        """What a response ends with, each as token ids: EOD; in chats also what the template puts after a response.

        White space at the template's end is not waited for: it is the same after every response.
        """
        ends = [[self._end]]
        if chat:
            text, after = self.template.short_conversation
            before = self.start.strip(self._encoder.encode(text[: len(text) - len(after)]), chat=True)
            whole = self.start.strip(self._encoder.encode(text.rstrip()), chat=True)
            if whole[: len(before)] == before:
                ends.append(whole[len(before) :])
        return [end for index, end in enumerate(ends) if end and end not in ends[:index]]

    def text(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens where the library leaves them out.

        Entries that a model has beyond its tokenizer's have none.
        """
        return self._tokenizer.detokenize([token for token in ids if token < self._tokenizer.vocab_size])

    def empty_prompt(self, chat: bool) -> TokenArray:
        """The prompt that says nothing, int32 [length >= 1]: what the unconditional log-probability is conditioned on.

        The start token (EOD where there is none) for string records; the template with one empty user turn, opened for
        the assistant's answer, for chat records.
        """
        return self._empty_turn([], {}) if chat else self._prompt("", chat=False)

    def own_unconditional_prompt(self, record: PreferenceRecord) -> TokenArray | None:
        """That of a record that brings more to its template than messages; None: it is :meth:`empty_prompt`.

        Tools, documents and the system's messages at the beginning are about the prompt, and left out; with
        ``unconditional_context`` they stay. Other variables are about the template, and always stay.
        """
        if not isinstance(record.prompt, list):
            return None
        kept = kept_context(record.prompt) if self._unconditional_context else []
        about_prompt = () if self._unconditional_context else (TOOLS, DOCUMENTS)
        variables = {name: value for name, value in record.variables.items() if name not in about_prompt}
        return self._empty_turn(kept, variables) if kept or variables else None

    def _empty_turn(self, before: list[Message], variables: dict[str, Any]) -> TokenArray:
        try:
            text = self.template.apply([*before, {"role": USER, "content": ""}], variables, add_generation_prompt=True)
        except RowProblem as problem:
            raise UserError(
                "--chat-template: the template cannot render an empty user turn, which is the prompt of the "
                f"unconditional log-probability ({problem.detail})."
            ) from problem
        return self._prompt(text, chat=True)

    def settings(self) -> dict[str, Any]:
        """What decides which tokens a record becomes, wherever the tokenizer's files lie.

        By name: a digest of vocabulary and rules, the chat template itself, and what is set beside it.
        """
        beside: dict[str, Any] = {}  # what is as by default is left out: stores of before are found again
        if self.template.variables:
            beside["chat_template_kwargs"] = self.template.variables
        if self._train_on != "all-assistant":
            beside["train_on"] = self._train_on
        if self._unconditional_context:
            beside["unconditional_context"] = True
        return {"tokenizer": self._without_template, "chat_template": self._tokenizer.chat_template, **beside}

    @functools.cached_property
    def _without_template(self) -> str:
        digest = hashlib.sha256(vocabulary(self._tokenizer, self._library))
        rules = {
            "rules_version": RULES_VERSION,
            "library": self._library,
            "start": self.start.tokens,
            "end": self._end,
            "added": [self._encoder.before, self._encoder.after],
        }
        digest.update(json.dumps(rules, sort_keys=True).encode())
        return digest.hexdigest()


def _scored(encoder: TextEncoder, text: str, spans: Spans, added: int, length: int, name: str) -> BoolArray | None:
    """Rule 6: which of a response's tokens are scored, [length]; None: all.

    Args:
        text: prompt and response.
        spans: where the assistant speaks in it.
        added: tokens that the response has beyond its text: its end.
    """
    cuts = [cut for span in spans for cut in span]
    whole, *places = encoder.places(text, [len(text), *cuts])
    scored = np.zeros(length, bool)
    for start, end in zip(places[::2], places[1::2], strict=True):  # counted from the end, where both texts agree
        from_end = length - added - whole
        scored[max(0, from_end + start) : from_end + end] = True
    if spans and spans[-1][1] == len(text):
        scored[length - added :] = True
    if not scored.any():
        raise RowProblem(ProblemKind.NO_ASSISTANT_TURN, f"{name} has no token of the assistant's")
    return None if scored.all() else scored


def _int32(ids: list[int]) -> TokenArray:
    return np.array(ids, dtype=np.int32)


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
