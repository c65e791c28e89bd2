"""The start token of a prompt: rules 2 and 5 of ``tokenization``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StartTokens:
    """What a prompt begins with, once, whether its text or the template spells it out or not."""

    tokens: list[int]
    """What the tokenizer's library puts in front by itself, else BOS; empty where there is neither."""
    end: int
    """EOD, which an empty prompt begins with where there is nothing else."""
    by_template: bool
    """A chat template writes them, where the model wants them."""

    def strip(self, ids: list[int], chat: bool) -> list[int]:
        """A text's tokens without them: :meth:`put` does that."""
        spelled_out = not (chat and self.by_template) and ids[: len(self.tokens)] == self.tokens
        return ids[len(self.tokens) :] if spelled_out else ids

    def put(self, prompt: list[int], chat: bool) -> list[int]:
        """A prompt's tokens with them."""
        if prompt and chat and self.by_template:
            return prompt
        return (self.tokens or ([] if prompt else [self.end])) + prompt
