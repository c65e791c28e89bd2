"""Pairs of tokens cut to limits of length."""

from __future__ import annotations

import numpy as np

from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.tokenization import PairTokens


def truncate(
    pair: PairTokens, max_prompt_tokens: int | None, max_response_tokens: int | None, start_tokens: list[int]
) -> PairTokens:
    """Keep the prompt's end, with its start tokens, and the beginning of each response; None is no limit.

    A response that is cut loses its end token: the model shall not learn to stop there.

    Raises:
        RowProblem: the responses are identical after the cut, and were not before.
    """
    one = pair.is_one_answer
    (prompt, chosen, rejected), scored = pair.parts, pair.scored
    if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
        starts_so = prompt[: len(start_tokens)].tolist() == start_tokens
        start = prompt[: min(len(start_tokens), max_prompt_tokens - 1)] if starts_so else prompt[:0]
        prompt = np.concatenate([start, prompt[len(prompt) - (max_prompt_tokens - len(start)) :]])
    if max_response_tokens is not None:
        chosen = chosen[:max_response_tokens]
        rejected = chosen if one else rejected[:max_response_tokens]
        first, second = (None if each is None else each[:max_response_tokens] for each in scored)
        scored = first, second
        if not one and np.array_equal(chosen, rejected):
            raise RowProblem(
                ProblemKind.IDENTICAL_AFTER_TRUNCATION,
                f"the first {max_response_tokens} tokens of chosen and rejected are the same",
            )
        for name, each in zip(("completion",) * 2 if one else ("chosen", "rejected"), scored, strict=True):
            if each is not None and not each.any():
                raise RowProblem(
                    ProblemKind.EMPTY_RESPONSE,
                    f"none of the first {max_response_tokens} tokens of {name} is the assistant's",
                )
    return PairTokens(prompt, chosen, rejected, *scored)
