"""Greedy decoding with the policy as it stands on its ranks, in any layout.

Megatron's own inference (``megatron.core.inference``) is not used: it takes no interleaved stages and no context
parallelism, and keeps keys for its own attention, which pairs have replaced. Here the prompts are packs like all
others, in Megatron's forward-only schedule, and the attention keeps their keys.

Every data- and context-parallel rank computes the same; the answers of the last rank count, so that all go on alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed

from megatron_bdpo.data.answering import GreedyAnswers
from megatron_bdpo.data.prompts import EvalPrompts
from megatron_bdpo.model.attention import KeptKeys
from megatron_bdpo.training.batches import to_batch
from megatron_bdpo.training.distributed import sum_over_ranks
from megatron_bdpo.training.forward import NextTokenStep, forward_only


@dataclass(frozen=True)
class PackShape:
    """How long packs of prompts may be."""

    limit: int
    """Longest pack, a multiple of ``unit``; no position is beyond it."""
    unit: int
    """Their lengths are multiples of this."""
    fixed: bool
    """All packs are ``limit`` long."""


def answer_greedily(
    model: list[Any], prompts: EvalPrompts, shape: PackShape, vocab_size: int, is_to_stop: Callable[[], bool]
) -> GreedyAnswers | None:
    """Answer all prompts together, a token of each per forward pass. Collective over all ranks.

    With pipeline stages the prompts are dealt out to as many microbatches, so that all stages have something to do.

    Args:
        model: the policy's chunks on this rank. Neither they nor a random state are changed.
        vocab_size: entries of the tokenizer.
        is_to_stop: asked before every pass; collective.

    Returns:
        The answers, the same on all ranks; None if they were given up.
    """
    microbatches = parallel_state.get_pipeline_model_parallel_world_size()
    answers = GreedyAnswers(prompts.tokens, prompts.ends, prompts.longest, microbatches)
    kept = [KeptKeys() for _ in range(microbatches)]
    step = NextTokenStep(vocab_size)
    while not answers.done:
        if is_to_stop():
            return None
        packs = answers.next_packs(shape.limit, shape.unit, fixed_length=shape.fixed)
        length = len(packs[0].tokens)
        batches = [to_batch(pack, length, shape.limit).to_device() for pack in packs]
        iterators = [iter(list(zip(batches, kept, strict=True))) for _ in model]
        # Megatron takes the length as that of all context-parallel ranks' parts; here each has the whole.
        whole = length * parallel_state.get_context_parallel_world_size()
        found = forward_only(model, step, iterators, microbatches, whole)
        answers.take(_of_last_rank(found, answers.fed))
    return answers


def _of_last_rank(found: list[torch.Tensor], count: int) -> list[int]:
    """The tokens that the last rank has found, on all ranks. It has the last stage. Collective."""
    tokens = torch.zeros(count, dtype=torch.int64)
    if distributed.get_rank() == distributed.get_world_size() - 1:
        tokens = torch.cat(found).cpu()
    numbers: list[int] = sum_over_ranks(tokens).tolist()
    return numbers
