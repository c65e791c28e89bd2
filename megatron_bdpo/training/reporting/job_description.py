"""A job in words: loss, pairs, plan."""

from __future__ import annotations

import itertools

import numpy as np

from megatron_bdpo.data.bin_packing import per_pack
from megatron_bdpo.data.context import imbalance
from megatron_bdpo.data.labels import labelled_sides
from megatron_bdpo.data.packs import lay_out
from megatron_bdpo.data.selection import Selection
from megatron_bdpo.data.step_plan import IntArray
from megatron_bdpo.training.job import PairJob, unit_of_steps

_PACKS_LOOKED_AT = 16


def describe_job(job: PairJob) -> list[str]:
    """Loss, pairs and plan of a job in a few lines."""
    plan, lengths, unit = job.plan, job.pool.group_lengths(job.train.ids), unit_of_steps(job.pool)
    unshared, shared = (int(lengths.positions(share_prompts=share).sum()) for share in (False, True))
    lines = [
        f"loss: {job.loss.describe()}",
        f"{job.pool.pairs.noun}: {_counted(job, job.train)} to train on, {_counted(job, job.held_out)} held out"
        + "".join(f"; {note}" for note in job.train.notes + job.held_out.notes),
        f"plan: {len(plan.steps)} steps of {plan.steps.shape[1]} {unit}, each in {plan.data_parallel} ranks "
        f"x {plan.microbatches} packs of {_range(plan.lengths)} positions; fill {plan.fill:.1%}",
    ]
    if unit == "groups":
        over = "pairs" if job.over_pairs else "groups, of the mean over a group's pairs"
        lines.append(f"groups: pairs of one row and prompt; a step's loss is the mean over its {over}")
    if job.loss.spec.takes == "answers":
        lines.append(_describe_labels(job))
    if job.fixed_length:
        fullest = per_pack(job.sizes[plan.steps], plan.pack_of, plan.packs_per_step).max()
        lines.append(f"fixed length of packs: the fullest one of the plan holds {fullest} tokens")
    if job.share_prompts:
        lines.append(f"shared prompts: {1 - shared / unshared:.1%} fewer tokens than one prompt per answer")
    if job.context_parallel > 1:
        lines.append(f"context parallel: {_describe_context(job)}")
    if job.prompts:
        lines.append(f"prompts: {job.prompts.describe()}, at every evaluation")
    return lines


def _describe_labels(job: PairJob) -> str:
    desirable, undesirable = job.labelled_answers
    pairs, table = job.pool.answers_of(job.train.ids)
    sides = labelled_sides(job.pool.pairs.label[pairs])
    both = len(np.intersect1d(*(table.place[sides[:, side], side] for side in (0, 1))))
    named = f"; {both} of them both, chosen in one pair of a row and rejected in another" if both else ""
    return f"answers: {desirable} desirable, {undesirable} undesirable to train on{named}"


def _counted(job: PairJob, selection: Selection) -> str:
    pairs = str(len(job.pool.grouping.pairs_of(selection.ids)))
    return f"{pairs} in {len(selection.ids)} groups" if unit_of_steps(job.pool) == "groups" else pairs


def _describe_context(job: PairJob) -> str:
    packs = zip(job.plan.packs(0, rank=0), job.plan.lengths[0].tolist(), strict=True)
    laid_out = [
        lay_out([job.pool.group(each).group for each in pack], length, share_prompts=job.share_prompts)
        for pack, length in itertools.islice(packs, _PACKS_LOOKED_AT)
    ]
    balance = [imbalance(pack, job.context_parallel) for pack in laid_out]
    return (
        f"{job.context_parallel} ranks share a pack; attention cost max/mean {np.mean(balance):.3f}, "
        f"worst {np.max(balance):.3f}, over the first {len(balance)} packs"
    )


def _range(lengths: IntArray) -> str:
    shortest, longest = int(lengths.min()), int(lengths.max())
    return str(longest) if shortest == longest else f"{shortest} to {longest}"
