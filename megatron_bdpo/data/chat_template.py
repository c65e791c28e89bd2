"""A tokenizer's chat template: the texts of conversations, and what ends a response."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_bdpo.data.deadline import deadline
from megatron_bdpo.data.messages import ASSISTANT, SYSTEM_ROLES, TOOLS, USER, Message
from megatron_bdpo.data.problems import ProblemKind, RowProblem, printable
from megatron_bdpo.data.vocabulary import MegatronTextTokenizer, library_object
from megatron_bdpo.errors import UserError

#: Libraries whose templates are rendered by transformers: with the names of the special tokens, and with variables.
_TRANSFORMERS = frozenset({"huggingface", "megatron"})

#: For one conversation; templates take about a millisecond. jinja2's sandbox bounds ranges, not loops in loops.
RENDER_SECONDS = 10.0

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_SHOWN = 100  # characters of a template in a message

type Spans = list[tuple[int, int]]
"""Stretches of a text, from and to a character, in order."""


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
        self._texts: dict[str, str] | None = None  # see ``remembering``

    @property
    def knows_bos(self) -> bool:
        """Whether it is told the start token's name, and so decides whether there is one."""
        return self._library in _TRANSFORMERS

    def apply(self, messages: list[Message], variables: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Args:
            variables: the row's own, which go before those of all rows.

        Raises:
            RowProblem: the template refuses it.
            UserError: the tokenizer has none.
        """
        if self._texts is None:
            return self._text(messages, variables, add_generation_prompt)
        conversation = repr((messages, variables, add_generation_prompt))
        if conversation not in self._texts:
            self._texts[conversation] = self._text(messages, variables, add_generation_prompt)
        return self._texts[conversation]

    def _text(self, messages: list[Message], variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        text = self._rendered(messages, variables, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside the block, a conversation is rendered once: the pairs of a row share their prompt and answers."""
        self._texts = {}
        try:
            yield
        finally:
            self._texts = None

    def reads(self, field: str) -> bool:
        """Whether the template's text names a field of messages, which otherwise has no effect."""
        return field in self._words

    @functools.cached_property
    def opening(self) -> str:
        """A question, and what the template puts between it and its response."""
        return self.apply([{"role": USER, "content": "a"}], {}, add_generation_prompt=True)

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
            with self._in_time():
                return self._tokenizer.apply_chat_template(messages, **given, **options)
        except UserError:
            raise
        except Exception as error:  # templates raise what they like, jinja2.TemplateError for one
            detail = f"{type(error).__name__}: {error}"
            if not self.knows_bos:
                detail += f" (Megatron gives the templates of {self._library} tokenizers no bos_token and no eos_token)"
            raise RowProblem(ProblemKind.TEMPLATE_REFUSED, detail) from error

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Raises UserError where the template takes too long; ``RowTokenizer`` says for which row."""
        try:
            with deadline(RENDER_SECONDS):
                yield
        except TimeoutError as error:
            start = printable(" ".join((self._tokenizer.chat_template or "").split()), _SHOWN)
            raise UserError(
                f"the tokenizer's chat template takes more than {RENDER_SECONDS:g} s for one conversation. It may loop "
                f"for ever: look at its text, or give another with --chat-template. It begins with {start}"
            ) from error

    def marked_spans(self, messages: list[Message], variables: Mapping[str, Any]) -> Spans | None:
        """What the template marks as the assistant's with ``{% generation %}``; None: it marks nothing."""
        if not (self.knows_bos and _GENERATION.search(self._tokenizer.chat_template or "")):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template  # of the extra hf

        tokenizer = library_object(self._tokenizer).tokenizer
        given = {**tokenizer.special_tokens_map, **self.variables, **variables}
        with self._in_time():
            _, marked = render_jinja_template(
                [messages],
                tools=given.pop(TOOLS, None),
                documents=given.pop("documents", None),
                chat_template=self._tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **given,
            )
        return list(marked[0])


def kept_context(prompt: list[Message]) -> list[Message]:
    """The messages of a prompt that are not about this prompt: the system's, at its beginning."""
    return list(itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, prompt))
