"""Greedy answers, token by token: what is fed to the model next, and when an answer ends. The model is elsewhere.

A round is a pack for each of the microbatches of one forward pass. In every round the sequences give what the model has
not seen of them, first the prompt, then the last token of the answer, as far as the packs have room. Keys and values of
earlier rounds are kept by whoever runs the model, for each microbatch apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_bdpo.data.bin_packing import round_up
from megatron_bdpo.data.packs import IntArray, Pack, lay_out_continued
from megatron_bdpo.data.tokenization import TokenArray


class GreedyAnswers:
    """Answers in the making.

    Attributes:
        answers: token ids of each answer so far, with its end.
        finished: whether each one has come to its end.
    """

    def __init__(
        self, prompts: Sequence[TokenArray], ends: Sequence[list[list[int]]], longest: int, microbatches: int
    ) -> None:
        """
        Args:
            prompts: token ids, each at least one.
            ends: of each prompt, the sequences of token ids at which its answer ends.
            longest: tokens of an answer, at most.
            microbatches: that prompts are dealt out to.
        """
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.finished = [False] * len(prompts)
        self._ends, self._longest, self._microbatches = ends, longest, microbatches
        self._pending = list(prompts)
        self._kept: list[IntArray] = [np.zeros(0, np.int64) for _ in prompts]
        self._fed: list[int] = []

    @property
    def done(self) -> bool:
        """Whether every answer has ended or is as long as it may be."""
        return not any(map(self._goes_on, range(len(self.answers))))

    def next_packs(self, limit: int, unit: int, *, fixed_length: bool = False) -> list[Pack]:
        """The next round: as many packs as there are microbatches, all of one length. Some may hold nothing.

        Args:
            limit: longest pack, a multiple of ``unit``; no prompt is longer.
            unit: the length is a multiple of this.
            fixed_length: the packs are ``limit`` long.
        """
        chosen = [self._that_fit(microbatch, limit) for microbatch in range(self._microbatches)]
        used = [sum(len(self._pending[index]) for index in some) for some in chosen]
        length = limit if fixed_length else round_up(max(used), unit)
        packs = []
        for microbatch, some in enumerate(chosen):
            pack, places = lay_out_continued([(self._pending[i], self._kept[i]) for i in some], length)
            for index in range(microbatch, len(self._kept), self._microbatches):
                self._kept[index] = self._kept[index] + pack.used
            for index, own in zip(some, places, strict=True):
                self._kept[index] = own
            packs.append(pack)
        self._fed = [index for some in chosen for index in some]
        return packs

    @property
    def fed(self) -> int:
        """Sequences in the round: tokens that :meth:`take` expects."""
        return len(self._fed)

    def take(self, tokens: Sequence[int]) -> None:
        """What the model says comes next in each sequence of the round, pack after pack."""
        for index, token in zip(self._fed, tokens, strict=True):
            answer = self.answers[index]
            answer.append(int(token))
            self.finished[index] = any(answer[-len(end) :] == end for end in self._ends[index])
            self._pending[index] = np.array([token], np.int32)

    def without_end(self, index: int) -> list[int]:
        """An answer's tokens before its end."""
        answer = self.answers[index]
        ends = [len(end) for end in self._ends[index] if answer[-len(end) :] == end]
        return answer[: len(answer) - max(ends, default=0)]

    def _goes_on(self, index: int) -> bool:
        return not self.finished[index] and len(self.answers[index]) < self._longest

    def _that_fit(self, microbatch: int, limit: int) -> list[int]:
        """Sequences of a microbatch that have a pack's room for what they have to give, in their order."""
        chosen, used = [], 0
        for index in range(microbatch, len(self.answers), self._microbatches):
            if self._goes_on(index) and used + len(self._pending[index]) <= limit:
                chosen.append(index)
                used += len(self._pending[index])
        return chosen
