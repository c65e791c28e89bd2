"""A tokenizer's chat template: the texts of conversations, who says what in them, and what ends a response."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_bdpo.data.messages import ASSISTANT, SYSTEM_ROLES, TOOLS, USER, Message
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.vocabulary import MegatronTextTokenizer, library_object
from megatron_bdpo.errors import UserError

#: Libraries whose templates are rendered by transformers: with the names of the special tokens, and with variables.
_TRANSFORMERS = frozenset({"huggingface", "megatron"})

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

type Spans = list[tuple[int, int]]
"""Stretches of a text, from and to a character, in order."""


class Rendered(NamedTuple):
    """A prompt and a response as one text. Only ``spans`` of the response are scored; None: all of it."""

    text: str
    spans: Spans | None = None


class ChatTemplate:
    """That of a tokenizer of Megatron's.

    Args:
        tokenizer: Megatron's.
        library: that it is made with.
        variables: what the template is given for every conversation (--chat-template-kwargs).
    """

    def __init__(
        self,
        tokenizer: MegatronTextTokenizer,
        library: str,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._library = tokenizer, library
        self.variables = dict(variables or {})

    @property
    def knows_bos(self) -> bool:
        """Whether it is told the start token's name, and so decides whether there is one."""
        return self._library in _TRANSFORMERS

    def render(self, record: PreferenceRecord) -> tuple[str, Rendered, Rendered]:
        """Texts of the prompt and of the two whole conversations: rule 4 of ``tokenization``.

        Raises:
            RowProblem: the template writes something else where the response begins, or between its turns.
        """
        assert isinstance(record.prompt, list)
        responses = [response for response in (record.chosen, record.rejected) if isinstance(response, list)]
        opened = all(response[0]["role"] == ASSISTANT for response in responses)
        prompt = self.apply(record.prompt, record.variables, add_generation_prompt=opened)
        texts = []
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            text = self.apply(record.prompt + response, record.variables, add_generation_prompt=False)
            if not text.startswith(prompt):
                raise RowProblem(
                    ProblemKind.TEMPLATE_MISMATCH,
                    f"the rendered prompt ends with {prompt[-40:]!r}, but with the response of {name} the template "
                    f"writes {text[max(0, len(prompt) - 40) : len(prompt)]!r} there",
                )
            spans = None if len(response) == 1 else self._spans(record, response, text, len(prompt), name)
            texts.append(Rendered(text, spans))
        return prompt, texts[0], texts[1]

    def apply(self, messages: list[Message], variables: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Args:
            variables: the row's own, which go before those of all rows.

        Raises:
            RowProblem: the template refuses it.
            UserError: the tokenizer has none.
        """
        text = self._rendered(messages, variables, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    def reads(self, field: str) -> bool:
        """Whether the template's text names a field of messages, which otherwise has no effect."""
        return field in self._words

    @functools.cached_property
    def leaves_turn_open(self) -> bool:
        """True when the template puts nothing but white space after a response, so that we have to end it."""
        return not self.short_conversation[1].strip()

    @functools.cached_property
    def short_conversation(self) -> tuple[str, str]:
        """The text of a question and its response, and the part of it that the template puts after the response."""
        question = {"role": USER, "content": "a"}
        texts = [
            self.apply([question, {"role": ASSISTANT, "content": answer}], {}, add_generation_prompt=False)
            for answer in ("b", "c")
        ]
        # Reading backwards, the two texts differ first where the response ends.
        same = itertools.takewhile(lambda ends: ends[0] == ends[1], zip(*(text[::-1] for text in texts), strict=False))
        return texts[0], "".join(character for character, _ in same)[::-1]

    @functools.cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self._tokenizer.chat_template or ""))

    def _rendered(self, messages: list[Message], variables: Mapping[str, Any], **options: Any) -> Any:
        if not self._tokenizer.chat_template:
            raise UserError(
                "The data is made of chat messages, but the tokenizer has no chat template. Give the "
                'template\'s text with --chat-template ("$(cat template.jinja)"), or use a tokenizer that has one.'
            )
        given = {**self.variables, **variables}
        if given and not self.knows_bos:
            raise RowProblem(
                ProblemKind.TEMPLATE_REFUSED,
                f"Megatron gives the templates of {self._library} tokenizers nothing but the messages, so they cannot "
                f"read {', '.join(sorted(given))}. Use a HuggingFaceTokenizer.",
            )
        if given.get(TOOLS) and not self.reads(TOOLS):
            raise RowProblem(ProblemKind.TEMPLATE_REFUSED, "the row has tools, and the chat template does not read any")
        try:
            return self._tokenizer.apply_chat_template(messages, **given, **options)
        except Exception as error:  # templates raise what they like, jinja2.TemplateError for one
            detail = f"{type(error).__name__}: {error}"
            if not self.knows_bos:
                detail += f" (Megatron gives the templates of {self._library} tokenizers no bos_token and no eos_token)"
            raise RowProblem(ProblemKind.TEMPLATE_REFUSED, detail) from error

    def _spans(
        self, record: PreferenceRecord, response: list[Message], text: str, prompt_ends: int, name: str
    ) -> Spans:
        """Where the assistant speaks in a response of several turns."""
        assert isinstance(record.prompt, list)
        if self.knows_bos and _GENERATION.search(self._tokenizer.chat_template or ""):
            return self._marked_spans(record.prompt + response, record.variables, prompt_ends)
        return self._spans_by_turn(record, response, text, name)

    def _marked_spans(self, messages: list[Message], variables: Mapping[str, Any], prompt_ends: int) -> Spans:
        """Those that the template itself marks with ``{% generation %}``."""
        from transformers.utils.chat_template_utils import render_jinja_template  # of the extra hf

        tokenizer = library_object(self._tokenizer).tokenizer
        given = {**tokenizer.special_tokens_map, **self.variables, **variables}
        _, marked = render_jinja_template(
            [messages],
            tools=given.pop(TOOLS, None),
            documents=given.pop("documents", None),
            chat_template=self._tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **given,
        )
        return [(max(start, prompt_ends), end) for start, end in marked[0] if end > prompt_ends]

    def _spans_by_turn(self, record: PreferenceRecord, response: list[Message], text: str, name: str) -> Spans:
        """What comes between the text before a turn, opened for the assistant, and the text with it."""
        assert isinstance(record.prompt, list)
        conversation, spans = record.prompt + response, []
        for index in range(len(record.prompt), len(conversation)):
            if conversation[index]["role"] != ASSISTANT:
                continue
            before = self.apply(conversation[:index], record.variables, add_generation_prompt=True)
            if not text.startswith(before):
                raise RowProblem(
                    ProblemKind.TEMPLATE_MISMATCH,
                    f"where turn {index + 1} of {name} begins, the template writes {before[-40:]!r} if it is the last, "
                    f"and {text[max(0, len(before) - 40) : len(before)]!r} if the conversation goes on",
                )
            spans.append((len(before), self._end_of_turn(record, conversation, index, text, len(before), name)))
        return spans

    def _end_of_turn(
        self, record: PreferenceRecord, conversation: list[Message], index: int, text: str, start: int, name: str
    ) -> int:
        if index == len(conversation) - 1:
            return len(text)
        upto = self.apply(conversation[: index + 1], record.variables, add_generation_prompt=False)
        if len(upto) > start and text.startswith(upto):
            return len(upto)
        # Some templates write a turn in another way once it is not the last: its reasoning is left out, for one. Then
        # it goes to the first end of a turn.
        after = self.short_conversation[1]
        mark = after.strip()
        at = text.find(mark, start) if mark else -1
        if at < 0:
            raise RowProblem(
                ProblemKind.TEMPLATE_MISMATCH, f"the template does not show where turn {index + 1} of {name} ends"
            )
        space = after[len(after.rstrip()) :]
        end = at + len(mark)
        return end + len(space) if text.startswith(space, end) else end


def kept_context(prompt: list[Message]) -> list[Message]:
    """The messages of a prompt that are not about this prompt: the system's, at its beginning."""
    return list(itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, prompt))
