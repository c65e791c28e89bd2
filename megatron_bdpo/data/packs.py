"""One pack of token positions: groups laid out with shared prompts, and who attends to whom.

A *group* is a prompt P and its k >= 1 answers. Two answers, as a pair's chosen and rejected ones:

    tokens     [ P ........ | A ....... | B ..... ]
    positions    0 .. |P|-1  |P| ..       |P| ..          every answer continues the prompt
    attends to   P, causal   P + A        P + B           an answer never sees another one

P is encoded once for all its answers. The first token of each answer is predicted from P's last hidden state, so what
is scored is a list (hidden index, target id, answer) and not a label row shifted by one. An answer of several turns may
hold tokens of others: they take part in its branch and are not scored.

Shapes: T pack length, R runs, K gathered keys, N scored positions, G groups, A answers of all groups, E ends of
answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """A prompt and its answers, to be laid out. All token arrays are int32 [length]."""

    prompt: TokenArray
    answers: Sequence[TokenArray]  # at least one
    scored: Sequence[BoolArray | None] | None = None  # of each answer, which of its tokens are scored; None: all


@dataclass(frozen=True)
class Pack:
    """A laid-out pack of length T: everything that the model needs to score its A answers, as NumPy arrays.

    Answers are numbered through the pack, group after group. Which of them are compared, the pack does not say.

    Attention is a list of R *runs*: the queries ``[sum(query_lengths[:r]), +query_lengths[r])`` of the pack attend to
    ``key_index[sum(key_lengths[:r]) : +key_lengths[r]]`` under a bottom-right causal mask. Runs cover the used part of
    the pack in order; padding after them attends to nothing.
    """

    tokens: IntArray  # [T]
    positions: IntArray  # [T] position of each token within its sequence
    groups: IntArray  # [T] number of the group that each token is of; of padding 0
    query_lengths: IntArray  # [R]
    key_lengths: IntArray  # [R]
    key_index: IntArray  # [K] pack index of each gathered key
    scored_hidden: IntArray  # [N] pack index whose hidden state predicts the target
    scored_target: IntArray  # [N] token id
    scored_answer: IntArray  # [N] in [0, A), non-decreasing
    answer_tokens: IntArray  # [A] scored tokens of each answer
    ends: IntArray  # [E] pack index of the last token of an answer that is not for padding: where rewards are read
    end_answer: IntArray  # [E] in [0, A), ascending: all answers, of a part those whose end it holds

    @property
    def used(self) -> int:
        """Positions that hold a token."""
        return int(self.query_lengths.sum())

    def attention_mask(self) -> npt.NDArray[np.bool_]:
        """[T, T], True where a query (row) sees a key: for models that take a mask instead of runs.

        Padding sees itself, so that no row is empty.
        """
        mask = np.eye(len(self.tokens), dtype=bool)
        starts = np.cumsum(self.query_lengths) - self.query_lengths
        ends = np.cumsum(self.key_lengths)
        for start, queries, end, keys in zip(starts, self.query_lengths, ends, self.key_lengths, strict=True):
            seen = np.arange(keys) <= np.arange(queries)[:, None] + (keys - queries)  # the last query sees all keys
            mask[np.arange(start, start + queries)[:, None], self.key_index[end - keys : end]] = seen
        return mask


@dataclass(frozen=True)
class GroupLengths:
    """How long groups are, whatever the number of their answers: all that positions and attention depend on."""

    prompt: IntArray  # [G] tokens of the prompt
    answers: IntArray  # [G] number of answers
    answer_tokens: IntArray  # [G] of all answers together
    answer_squares: IntArray  # [G] sum of the squares of their tokens

    @classmethod
    def of_table(cls, lengths: npt.NDArray[np.integer]) -> GroupLengths:
        """Of groups with equally many answers: ``lengths`` [G, 1 + k] are tokens of prompt and answers."""
        prompt, answers = lengths[:, 0].astype(np.int64), lengths[:, 1:].astype(np.int64)
        return cls(prompt, np.full(len(prompt), answers.shape[1]), answers.sum(axis=1), (answers**2).sum(axis=1))

    @classmethod
    def of_answers(cls, prompt: npt.NDArray[np.integer], group: IntArray, tokens: IntArray) -> GroupLengths:
        """From the prompts' tokens [G], and of each answer its group and tokens, [A]."""

        def sums(values: IntArray) -> IntArray:
            return np.bincount(group, values, minlength=len(prompt)).astype(np.int64)

        return cls(prompt.astype(np.int64), sums(np.ones_like(tokens)), sums(tokens), sums(tokens**2))

    def with_prompts(self, prompt: npt.NDArray[np.integer]) -> GroupLengths:
        """The same answers after prompts of other lengths, [G]."""
        return replace(self, prompt=prompt.astype(np.int64))

    def positions(self, *, share_prompts: bool) -> IntArray:
        """[G] pack positions that each group takes."""
        return self.prompt * (1 if share_prompts else self.answers) + self.answer_tokens

    def squares(self, *, share_prompts: bool) -> IntArray:
        """[G] attention: twice the keys that a group's queries see, which for a sequence of n tokens is n squared."""
        prompts = self.prompt**2 * (1 if share_prompts else self.answers)
        return prompts + 2 * self.prompt * self.answer_tokens + self.answer_squares


def group_tokens(lengths: npt.NDArray[np.integer], *, share_prompts: bool) -> IntArray:
    """[G] pack positions of groups with equally many answers; ``lengths`` as in ``GroupLengths.of_table``."""
    return GroupLengths.of_table(lengths).positions(share_prompts=share_prompts)


def lay_out(
    groups: Sequence[Group], length: int, *, share_prompts: bool = True, padding_token: int | None = None
) -> Pack:
    """Lay groups out in one pack of ``length`` positions.

    Args:
        groups: in order; may be none (a rank with nothing to do still takes part in collectives).
        length: T. Positions after the last group are padding: token 0, position 0, attended by nothing.
        share_prompts: encode each prompt once; otherwise each answer gets its own copy (the plain layout, kept as the
            oracle and for measuring what sharing saves).
        padding_token: an answer never ends with it: it ends with the last other token, of the prompt if need be.

    Raises:
        ValueError: if the groups do not fit, or a prompt is empty: the first token of its answers would be predicted
            from nothing.
    """
    builder = _PackBuilder(length, padding_token)
    for number, group in enumerate(groups):
        if not len(group.prompt):
            raise ValueError(f"group {number} has an empty prompt: give it a start token at least")
        builder.group = number
        answers = list(zip(group.answers, group.scored or itertools.repeat(None), strict=False))
        if share_prompts:
            prompt = builder.add_segment(group.prompt, prefix=_NOTHING, first_position=0)
            for answer, scored in answers:
                builder.add_branch(answer, scored, prompt)
        else:
            for answer, scored in answers:
                builder.add_sequence(group.prompt, answer, scored)
    return builder.finish()


def lay_out_continued(sequences: Sequence[tuple[TokenArray, IntArray]], length: int) -> tuple[Pack, list[IntArray]]:
    """Lay out the next tokens of sequences whose earlier keys were kept: the whole prompts first, then token by token.

    A kept key is known by its place among all keys of the passes so far, those of the last pass first. The pass that is
    laid out here puts its own before them.

    Args:
        sequences: of each one its next tokens, at least one, and the places of its keys before them.
        length: T.

    Returns:
        The pack, which scores what follows the last token of each sequence, without targets; and the places of each
        sequence's keys once the pass is done. Keys of other sequences have moved on by ``pack.used``.

    Raises:
        ValueError: if the tokens do not fit.
    """
    builder, places = _PackBuilder(length), []
    used = sum(len(tokens) for tokens, _ in sequences)
    for builder.group, (tokens, kept) in enumerate(sequences):
        own = builder.add_segment(tokens, prefix=used + kept, first_position=len(kept))
        builder.scored.append((own[-1:], _NO_TARGET))
        places.append(np.concatenate([used + kept, own]))
    return builder.finish(), places


_NOTHING: IntArray = np.zeros(0, np.int64)
_NO_TARGET = np.zeros(1, np.int32)


class _PackBuilder:
    def __init__(self, length: int, padding_token: int | None = None) -> None:
        self.tokens = np.zeros(length, np.int64)
        self.positions = np.zeros(length, np.int64)
        self.groups = np.zeros(length, np.int64)
        self.group = 0
        self.used = 0
        self.query_lengths: list[int] = []
        self.keys: list[IntArray] = []
        self.scored: list[tuple[IntArray, TokenArray]] = []
        self.padding_token = padding_token
        self.ends: list[int] = []

    def add_segment(self, tokens: TokenArray, prefix: IntArray, first_position: int) -> IntArray:
        """Append tokens that attend to ``prefix`` and, causally, to themselves. Returns their pack indices."""
        start, stop = self.used, self.used + len(tokens)
        if stop > len(self.tokens):
            raise ValueError(f"pack of {len(self.tokens)} positions overflows: {stop} needed")
        own = np.arange(start, stop)
        self.tokens[start:stop] = tokens
        self.positions[start:stop] = np.arange(first_position, first_position + len(tokens))
        self.groups[start:stop] = self.group
        self.query_lengths.append(len(tokens))
        self.keys.append(np.concatenate([prefix, own]))
        self.used = stop
        return own

    def add_branch(self, answer: TokenArray, scored: BoolArray | None, prompt: IntArray) -> None:
        own = self.add_segment(answer, prefix=prompt, first_position=len(prompt))
        self._score(np.concatenate([prompt[-1:], own[:-1]]), answer, scored)
        self._end(prompt, own)

    def add_sequence(self, prompt: TokenArray, answer: TokenArray, scored: BoolArray | None) -> None:
        own = self.add_segment(np.concatenate([prompt, answer]), prefix=_NOTHING, first_position=0)
        self._score(own[len(prompt) - 1 : -1], answer, scored)
        self._end(own[: len(prompt)], own[len(prompt) :])

    def _score(self, hidden: IntArray, answer: TokenArray, scored: BoolArray | None) -> None:
        """An answer, each of whose tokens is predicted from the position beside it in ``hidden``."""
        self.scored.append((hidden, answer) if scored is None else (hidden[scored], answer[scored]))

    def _end(self, prompt: IntArray, own: IntArray) -> None:
        """Of an answer and its prompt, as transformers' models for sequence classification look for it."""
        sequence = np.concatenate([prompt, own]) if len(own) == 0 or self._is_padding(own[-1]) else own
        while len(sequence) > 1 and self._is_padding(sequence[-1]):
            sequence = sequence[:-1]
        self.ends.append(int(sequence[-1]))

    def _is_padding(self, place: np.int64) -> bool:
        return self.padding_token is not None and self.tokens[place] == self.padding_token

    def finish(self) -> Pack:
        answer_tokens = np.array([len(answer) for _, answer in self.scored], np.int64)
        return Pack(
            tokens=self.tokens,
            positions=self.positions,
            groups=self.groups,
            query_lengths=np.array(self.query_lengths, np.int64),
            key_lengths=np.array([len(keys) for keys in self.keys], np.int64),
            key_index=_concatenate(self.keys),
            scored_hidden=_concatenate([hidden for hidden, _ in self.scored]),
            scored_target=_concatenate([answer.astype(np.int64) for _, answer in self.scored]),
            scored_answer=np.repeat(np.arange(len(answer_tokens)), answer_tokens),
            answer_tokens=answer_tokens,
            ends=np.array(self.ends, np.int64),
            end_answer=np.arange(len(self.ends)),
        )


def _concatenate(arrays: list[IntArray]) -> IntArray:
    return np.concatenate(arrays) if arrays else _NOTHING
