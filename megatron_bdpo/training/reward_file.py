"""Rewards of the answers of a job's pairs as lines of JSON: what the scoring program writes with --objective reward."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.errors import UserError
from megatron_bdpo.training import identity
from megatron_bdpo.training.batches import IntArray
from megatron_bdpo.training.distributed import all_ranks_agree, is_rank_zero, say
from megatron_bdpo.training.finite import check_rewards
from megatron_bdpo.training.hf.start import architecture_of
from megatron_bdpo.training.reference.passes import FloatArray, Groups
from megatron_bdpo.training.reference.scoring_loop import make_scorer
from megatron_bdpo.training.scored_rows import ScoredRows
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.setup import RunSetup
from megatron_bdpo.training.token_stores import form_of_rows

#: Blocks of packs in one call of the model; a stop is heard between calls. With pipeline stages it keeps them busy.
_BLOCKS = 8


def check_reward_model(settings: Settings) -> None:
    """Refuse to score with a head that nobody has trained, or into a file that is there. Collective.

    Raises:
        UserError: on every rank, with the way out.
    """
    directories, named = settings.directories, settings.model.hf_model
    kept = [identity.checkpoint_directory(root) for root in (directories.load, directories.pretrained_checkpoint)]
    with all_ranks_agree():
        is_trained = bool(named) and architecture_of(Path(named or ""), reward_models=True).is_reward_model
        if not (is_trained or any(kept)):
            raise UserError(
                f"{f'--hf-model {named}' if named else 'the model'} has no head to score with. Name a reward model "
                "with --hf-model, or a checkpoint of one with --load."
            )
        flag, target = _target(settings)
        if is_rank_zero() and target.exists():
            raise UserError(f"{flag} {target} is there already. Remove it, or name another file.")


def write_rewards(setup: RunSetup, model: list[Any], pause: Callable[[], None]) -> Path:
    """Score all pairs of the job's data, and write the file. Collective.

    Args:
        model: this rank's chunks.
        pause: called between calls of the model, on all ranks; may raise to leave, and nothing is written then.

    Raises:
        UserError: on every rank; a reward is not finite, or the file cannot be written.
    """
    job, (flag, target) = setup.job, _target(setup.settings)
    groups = np.sort(np.concatenate([job.train.ids, job.held_out.ids]))
    ids = job.pool.grouping.pairs_of(groups)
    start = time.perf_counter()
    rewards = _rewards(setup, model, groups, pause)
    with all_ranks_agree():
        check_rewards(rewards, job.pool.pairs.starts[ids, 1:], lambda place: job.pool.describe(int(ids[place])))
    written = ScoredRows(job.pool, form_of_rows(setup.settings)) if setup.settings.objective.scored_rows else None
    with all_ranks_agree():
        if is_rank_zero():
            lines = written.lines(ids, rewards[:, 0]) if written else _lines(job.pool, ids, rewards)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, lines)
            except OSError as error:
                raise UserError(f"{flag} {target} cannot be written: {error.strerror or error}.") from error
    if written:
        what = written.told()
    else:
        wins = float(np.mean(rewards[:, 0] > rewards[:, 1]))
        what = f"rewards of {len(ids)} pairs, chosen above rejected in {wins:.1%},"
    say(f"{what} written to {target} in {time.perf_counter() - start:.1f} s")
    return target


def _target(settings: Settings) -> tuple[str, Path]:
    """The flag that names the file, and it."""
    objective = settings.objective
    flag, file = ("--rewards", objective.rewards) if objective.rewards else ("--scored-rows", objective.scored_rows)
    return flag, Path(file or "")


def _rewards(setup: RunSetup, model: list[Any], groups: IntArray, pause: Callable[[], None]) -> FloatArray:
    """[P, 2] of chosen and rejected of the groups' pairs, on every rank."""
    scorer = make_scorer(setup, model, groups)
    found = []
    for blocks in itertools.batched(scorer.blocks(Groups.of(groups, PromptKind.OWN)), _BLOCKS):
        found.append(scorer(blocks))
        pause()
    return np.concatenate(found)


def _lines(pool: PairPool, ids: IntArray, rewards: FloatArray) -> Iterator[str]:
    """A line for each pair: its source and row, and the rewards of its answers."""
    for pair, (chosen, rejected) in zip(ids.tolist(), rewards.tolist(), strict=True):
        source, row = pool.origin(pair)
        record = {"source": source, "row": row, "chosen": chosen, "rejected": rejected}
        yield json.dumps(record, allow_nan=False) + "\n"
