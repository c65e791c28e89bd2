"""Each comparison fails when what it guards is broken: mistakes that other trainers have made, made on purpose."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.harness.parity import beyond, deviations
from tests.harness.recording import Mistake
from tests.parity.matrix import ALLOWED, CP2, MODELS, PP2, TP2_SP

#: Nothing packed and nothing shared: what the packed, shared layout has to reproduce.
ONE_AT_A_TIME = ("--no-pack-pairs", "--no-share-prompts")

#: All pairs in every step: which pairs make up a step depends on their sizes, and so on sharing.
ONE_STEP = {"pairs_per_step": 16, "train_iters": 1}


# Mistakes. Each is given an undo stack, and lasts as long as that. --------------------------------------------------


def sum_of_own_positions_only(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model import pair_gpt

    original = pair_gpt.answer_log_probs
    undo.enter_context(
        mock.patch.object(pair_gpt, "answer_log_probs", lambda tokens, scored, group: original(tokens, scored))
    )


def pairs_counted_on_every_context_rank(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training import forward

    state = SimpleNamespace(
        get_context_parallel_group=forward.parallel_state.get_context_parallel_group,
        get_context_parallel_rank=lambda: 0,
    )
    undo.enter_context(mock.patch.object(forward, "parallel_state", state))


def key_gradients_of_other_ranks_dropped(undo: contextlib.ExitStack) -> None:
    from functools import partial

    from megatron_bdpo.model import attention

    gather = partial(attention.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False)
    undo.enter_context(mock.patch.object(attention, "gather_from_sequence_parallel_region", gather))


def positions_counted_from_zero_on_every_rank(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training import batches

    original = batches.context_part

    def part(pack: Any, context: Any) -> Any:
        pack = original(pack, context)
        pack.positions[:] = np.arange(len(pack.positions))
        return pack

    undo.enter_context(mock.patch.object(batches, "context_part", part))


def norms_not_summed_over_the_sequence(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model import pair_gpt

    original = pair_gpt.LocalNorm

    def norm(*args: Any, **kwargs: Any) -> Any:
        module = original(*args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = False
        return module

    undo.enter_context(mock.patch.object(pair_gpt, "LocalNorm", norm))


def tied_embedding_not_summed_over_stages(undo: contextlib.ExitStack) -> None:
    import importlib

    # Not by `import ... as`: megatron.core.distributed exports a function under the module's name.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    undo.enter_context(mock.patch.object(module, "_allreduce_word_embedding_grads", lambda *args: None))


def mean_per_microbatch(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training.flags import arguments

    undo.enter_context(mock.patch.dict(arguments.PAIR_DEFAULTS, calculate_per_token_loss=False))


def auxiliary_loss_weighed_by_own_tokens(undo: contextlib.ExitStack) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_bdpo.model.moe import PairRouter

    undo.enter_context(mock.patch.object(PairRouter, "_apply_aux_loss", TopKRouter._apply_aux_loss))


def branches_one_position_late(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.data import packs

    def add_branch(self: Any, response: Any, scored: Any, prompt: Any) -> None:
        own = self.add_segment(response, prefix=prompt, first_position=len(prompt) + 1)
        self.scored.append((np.concatenate([prompt[-1:], own[:-1]]), response))

    undo.enter_context(mock.patch.object(packs._PackBuilder, "add_branch", add_branch))


def second_branch_without_its_prompt(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.data import packs

    def add_branch(self: Any, response: Any, scored: Any, prompt: Any) -> None:
        is_second = len(self.scored) % 2 == 1
        own = self.add_segment(response, prefix=prompt[:0] if is_second else prompt, first_position=len(prompt))
        self.scored.append((np.concatenate([prompt[-1:], own[:-1]]), response))

    undo.enter_context(mock.patch.object(packs._PackBuilder, "add_branch", add_branch))


def second_branch_sees_the_first(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.data import packs

    def add_branch(self: Any, response: Any, scored: Any, prompt: Any) -> None:
        past = np.arange(prompt[0], self.used)
        own = self.add_segment(response, prefix=past, first_position=len(prompt))
        self.scored.append((np.concatenate([prompt[-1:], own[:-1]]), response))

    undo.enter_context(mock.patch.object(packs._PackBuilder, "add_branch", add_branch))


@dataclass(frozen=True)
class Mutation:
    """A mistake, where it shows, and the quantities that must be seen to be off."""

    mistake: Mistake
    seen_in: set[str]
    ranks: int = 1
    flags: str = ""
    model: str = "dense"
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of both runs, the mistaken one and the one that is right."""
    expected_flags: tuple[str, ...] = ()
    """Of the one that is right."""


GRADIENTS = {"gradients"}

MUTATIONS = {
    "sum of own positions only": Mutation(sum_of_own_positions_only, {"log-probs", "gradients"}, 2, CP2),
    "pairs counted on every context rank": Mutation(pairs_counted_on_every_context_rank, GRADIENTS, 2, CP2),
    "key gradients of other ranks dropped": Mutation(key_gradients_of_other_ranks_dropped, GRADIENTS, 2, CP2),
    "positions counted from zero": Mutation(positions_counted_from_zero_on_every_rank, {"log-probs"}, 2, CP2),
    "norms not summed over the sequence": Mutation(norms_not_summed_over_the_sequence, GRADIENTS, 2, TP2_SP),
    "tied embedding not summed over stages": Mutation(
        tied_embedding_not_summed_over_stages, GRADIENTS, 2, PP2, "tied, qkv biases, q/k norms"
    ),
    "mean per microbatch, not per pair": Mutation(mean_per_microbatch, GRADIENTS, 2, overrides={"pairs_per_step": 7}),
    "auxiliary loss weighed by own tokens": Mutation(
        auxiliary_loss_weighed_by_own_tokens, GRADIENTS, 2, TP2_SP, "experts"
    ),
    "branches one position late": Mutation(
        branches_one_position_late, {"log-probs"}, overrides=ONE_STEP, expected_flags=ONE_AT_A_TIME
    ),
    "second branch without its prompt": Mutation(
        second_branch_without_its_prompt, {"log-probs"}, overrides=ONE_STEP, expected_flags=ONE_AT_A_TIME
    ),
    "second branch sees the first": Mutation(
        second_branch_sees_the_first, {"log-probs"}, overrides=ONE_STEP, expected_flags=ONE_AT_A_TIME
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_caught(run, one_process, name):
    mutation = MUTATIONS[name]
    model = MODELS[mutation.model].overrides | mutation.overrides
    expected = one_process(list(mutation.expected_flags), model)
    flags = [*mutation.flags.split(), "--no-step-zero-check"]  # it would stop some of these runs before we could
    found = run(mutation.ranks, flags, model, mutation.mistake)
    assert mutation.seen_in <= beyond(deviations(found, expected), ALLOWED).keys()


def test_one_pair_at_a_time_is_the_same_without_mistakes(run, one_process):
    """Else the mistakes in the shared layout above would prove nothing."""
    model = MODELS["dense"].overrides | ONE_STEP
    found = deviations(run(1, [], model), one_process(list(ONE_AT_A_TIME), model))
    assert beyond(found, ALLOWED) == {}
