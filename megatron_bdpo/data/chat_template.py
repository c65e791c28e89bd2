"""A tokenizer's chat template: the texts of conversations, and what it puts after a response."""

from __future__ import annotations

import functools
import itertools

from megatron_bdpo.data.records import ASSISTANT, USER, Message, PreferenceRecord, ProblemKind, RowProblem
from megatron_bdpo.data.vocabulary import MegatronTextTokenizer
from megatron_bdpo.errors import UserError

#: Libraries whose templates are rendered with the names of the special tokens, bos_token among them.
_KNOW_BOS = frozenset({"huggingface", "megatron"})


class ChatTemplate:
    """That of a tokenizer of Megatron's."""

    def __init__(self, tokenizer: MegatronTextTokenizer, library: str) -> None:
        self._tokenizer, self._library = tokenizer, library

    @property
    def knows_bos(self) -> bool:
        """Whether it is told the start token's name, and so decides whether there is one."""
        return self._library in _KNOW_BOS

    def render(self, record: PreferenceRecord) -> tuple[str, str, str]:
        """Texts of the prompt and of the two whole conversations: rule 4 of ``tokenization``.

        Raises:
            RowProblem: the template writes something else where the response begins.
        """
        assert isinstance(record.prompt, list)
        prompt = self.apply(record.prompt, add_generation_prompt=True)
        texts = []
        for name, response in (("chosen", record.chosen), ("rejected", record.rejected)):
            assert isinstance(response, list)
            text = self.apply(record.prompt + response, add_generation_prompt=False)
            if not text.startswith(prompt):
                raise RowProblem(
                    ProblemKind.TEMPLATE_MISMATCH,
                    f"the rendered prompt ends with {prompt[-40:]!r}, but with the response of {name} the template "
                    f"writes {text[max(0, len(prompt) - 40) : len(prompt)]!r} there",
                )
            texts.append(text)
        return prompt, texts[0], texts[1]

    def apply(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            RowProblem: the template refuses it.
            UserError: the tokenizer has none.
        """
        if not self._tokenizer.chat_template:
            raise UserError(
                "The data is made of chat messages, but the tokenizer has no chat template. Give the "
                'template\'s text with --chat-template ("$(cat template.jinja)"), or use a tokenizer that has one.'
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like, jinja2.TemplateError for one
            detail = f"{type(error).__name__}: {error}"
            if not self.knows_bos:
                detail += f" (Megatron gives the templates of {self._library} tokenizers no bos_token and no eos_token)"
            raise RowProblem(ProblemKind.TEMPLATE_REFUSED, detail) from error
        assert isinstance(text, str)
        return text

    @functools.cached_property
    def leaves_turn_open(self) -> bool:
        """True when the template puts nothing but white space after a response, so that we have to end it."""
        return not self.short_conversation[1].strip()

    @functools.cached_property
    def short_conversation(self) -> tuple[str, str]:
        """The text of a question and its response, and the part of it that the template puts after the response."""
        question = {"role": USER, "content": "a"}
        texts = [
            self.apply([question, {"role": ASSISTANT, "content": answer}], add_generation_prompt=False)
            for answer in ("b", "c")
        ]
        # Reading backwards, the two texts differ first where the response ends.
        same = itertools.takewhile(lambda ends: ends[0] == ends[1], zip(*(text[::-1] for text in texts), strict=False))
        return texts[0], "".join(character for character, _ in same)[::-1]
