"""Small preference jobs, run in place on the ranks of a pool."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bdpo.training.callbacks.callback import Callback, Start, StepResult
from megatron_bdpo.training.reference.cache import Scores, open_scores

DATA = Path(__file__).parents[2] / "examples" / "data"

#: The first 19 of the example's held-out pairs: what evaluates all 99, again and again, does little else.
FEW_HELD_OUT = Path(__file__).with_name("heldout.jsonl")

#: A model small enough for hundreds of runs, yet with everything: grouped queries, RMSNorm, SwiGLU, rope, two stages.
TINY_MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}

TINY_JOB = {
    "pair_data": [str(DATA / "train.jsonl")],
    "max_pairs": 48,
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": str(DATA / "tokenizer.model"),
    "seq_length": 512,
    "pairs_per_step": 8,
    "train_iters": 3,
    "lr": 1e-3,
    "lr_decay_style": "constant",
}

#: One step of plain SGD on the DPO loss of four pairs, which an oracle takes too.
SGD = {
    "max_pairs": 4,
    "pairs_per_step": 4,
    "train_iters": 1,
    "preference_loss": "dpo",
    "beta": 0.1,
    "optimizer": "sgd",
    "sgd_momentum": 0.0,
    "weight_decay": 0.0,
    "clip_grad": 0.0,
    "lr": 0.1,
}


#: A rank's pieces of whole tensors: (name, whole shape, place, values).
Shards = list[tuple[str, tuple[int, ...], tuple[Any, ...], np.ndarray]]


def flags_of(values: Mapping[str, object]) -> list[str]:
    """Flags by name, without dashes, and their values: paths above all, which may hold spaces."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@dataclass
class Outcome:
    """What one rank saw. ``steps`` and ``evaluations`` are filled on the last pipeline stage."""

    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    shards: Shards
    exit_code: int | None = None


def train(flags: list[str], *, callbacks: Sequence[Callback] = (), **overrides: Any) -> Outcome:
    """Run the tiny job with ``flags`` on this rank. ``overrides`` replace defaults by argument name."""
    weights = WeightsKept()
    run, exit_code = run_job(flags, overrides, [*callbacks, weights])
    return Outcome(run.progress.steps, run.progress.evaluations, list(weights.shards), exit_code)


def refusals(check: str, command_lines: Sequence[tuple[str, int]]) -> list[str]:
    """What a check says of each command line of the tiny job, with so many ranks; empty where it passes.

    Args:
        check: ``package.module.function``, of parsed settings.
    """
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.flags.arguments import Arguments

    module, _, name = check.rpartition(".")
    found = []
    for flags, ranks in command_lines:
        arguments = Arguments.parse(flags.split(), TINY_MODEL | TINY_JOB)
        arguments.set(world_size=ranks)
        try:
            getattr(importlib.import_module(module), name)(arguments.settings)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def own_process() -> Any:
    """This rank's ``ProcessSettings``, from the environment that the pool has given it."""
    from megatron_bdpo.training.megatron_settings import ProcessSettings

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return ProcessSettings(rank=rank, local_rank=rank, ranks=ranks, backend="gloo", timeout_minutes=1, is_made_up=False)


class WeightsKept(Callback):
    """Copies the weights after each step."""

    def __init__(self) -> None:
        self.shards: Shards = []
        """After the last one so far."""
        self._model: list[Any] = []

    def after_load(self, start: Start) -> None:
        self._model = start.model

    def after_step(self, step: StepResult) -> None:
        self.shards = copy_shards(self._model)


def score(flags: list[str], **overrides: Any) -> list[Path]:
    """Score the tiny job's pairs on this rank, in a job of its own. Returns the directories of the scores."""
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.reference.scoring_job import score_pairs

    arguments = Arguments.parse(flags, TINY_MODEL | TINY_JOB | overrides)
    with distributed.process_groups(arguments.settings.process):
        return score_pairs(arguments)


def run_job(
    flags: list[str],
    overrides: dict[str, Any],
    callbacks: Sequence[Callback] = (),
    *,
    run_type: type[Any] | None = None,
) -> tuple[Any, int | None]:
    """Run the tiny job to its end. Returns the run and, where Megatron has left its loop early, its exit code.

    Args:
        run_type: another ``PreferenceRun``, for tests that change what a callback only sees.
    """
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.run import PreferenceRun

    arguments = Arguments.parse(flags, TINY_MODEL | TINY_JOB | overrides)
    with distributed.process_groups(arguments.settings.process):
        run = (run_type or PreferenceRun)(arguments, callbacks)
        try:
            run.pretrain()
        except SystemExit as stop:  # --exit-interval and signals end Megatron's loop this way
            return run, int(stop.code or 0)
        except BaseException:
            _leave_background_saves()
            raise
        finally:
            _empty(run.model)
            destroy_moe_metrics_tracker()  # it has room for the layers of the first job with experts
    return run, None


def _leave_background_saves() -> None:
    """What a run that failed is still writing for ``--async-save`` ends with its process; a rank of a pool lives on.

    Its results would be taken for those of the next run's checkpoints.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import async_utils

    if async_utils._async_calls_queue is not None:
        async_utils._async_calls_queue.close(abort=True)
        async_utils._async_calls_queue = None
    filesystem_async._results_queue = None


def _empty(model: list[Any]) -> None:
    """Take from DDP what it holds, the process groups above all.

    Autograd's nodes hold its hooks, and with the distributed optimizer they are in a cycle that Python does not see: it
    would stay for as long as the rank, and so would the threads of its process groups.
    """
    for chunk in model:
        vars(chunk).clear()


def copy_shards(model: list[Any], *, trained: bool = False) -> Shards:
    """This rank's main copies of the weights.

    Args:
        trained: only of those that have gradients.
    """
    from megatron.core.utils import unwrap_model

    from megatron_bdpo.model.shards import adapter_shards, is_main_copy, own_slices, weight_shards

    chunks = unwrap_model(model)
    return [
        (
            shard.key,
            shard.global_shape,
            (*shard.global_offset[: shard.prepend_axis_num], *own_slices(shard)),
            shard.data.detach().float().cpu().numpy().copy(),
        )
        for shard in itertools.chain(weight_shards(chunks), adapter_shards(chunks))
        if is_main_copy(shard) and (shard.data.requires_grad or not trained)
    ]


def whole_weights(outcomes: list[Outcome]) -> dict[str, np.ndarray]:
    """The unsharded weights, from what all ranks hold."""
    return assemble(outcome.shards for outcome in outcomes)


def assemble(shards: Iterable[Shards]) -> dict[str, np.ndarray]:
    """Whole tensors by name, from the pieces of all ranks. Those of layers are stacked: [layers, ...]."""
    whole: dict[str, np.ndarray] = {}
    for name, shape, place, values in itertools.chain.from_iterable(shards):
        target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
        target[place] = values
    for name, values in whole.items():
        if not np.isfinite(values).all():
            raise AssertionError(f"{name}: not every element was found on some rank, or some are not finite")
    return whole


def scores_in(cache: Path) -> Scores:
    """The reference scores that a job has left in its --pair-cache-dir: of one reference, on one store."""
    (manifest,) = cache.glob("reference-*/*/manifest.json")
    return open_scores(manifest.parent)


def last_stage[Seen](ranks: Sequence[Seen]) -> Seen:
    """Of what the ranks have seen, that which holds the metrics."""
    return ranks[-1]


def seeded(seed: int) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)
