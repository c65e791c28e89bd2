"""From rows to a job, before Megatron starts: they are tokenised, selected as the loss wants, dealt out to steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_bdpo.data.bin_packing import pack_evenly, round_up
from megatron_bdpo.data.held_out import hold_out
from megatron_bdpo.data.pool import PairPool, by_source
from megatron_bdpo.data.prompts import EvalPrompts, PromptRow, encode_prompts, read_prompts
from megatron_bdpo.data.selection import Selection, drop_long, refuse_labelled_answers, select
from megatron_bdpo.data.step_plan import IntArray, PlanSettings, StepPlan, epoch_pairs, plan_steps
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.losses import LossFunction, registry
from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
from megatron_bdpo.model.hf.classifier import padding_token
from megatron_bdpo.training import job_checks
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.job import PairJob, unit_of_steps
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.token_stores import cache_directory, open_stores, pair_tokenizer

#: Tokens of an answer to --eval-prompts, at most, unless --eval-prompt-tokens says otherwise.
_DEFAULT_ANSWER = 64


def build_job(arguments: Arguments) -> PairJob:
    """Read, tokenise and plan. Rank 0 does the reading; all ranks open its result. Collective.

    Raises:
        UserError: on every rank, for anything wrong with flags or data.
    """
    settings = arguments.settings
    with all_ranks_agree():
        loss = settings.build_loss()
        job_checks.check_loss(settings, loss)
        plan_settings(settings)  # what is wrong with the plan whatever the pairs: before they are read
    file = settings.evaluation.eval_prompts
    with all_ranks_agree():
        rows = read_prompts(file) if file and is_rank_zero() else []
    stores = open_stores(arguments)
    prompts = _prompts(arguments, rows, stores[0]) if file else None
    with all_ranks_agree():
        return plan_job(settings, loss, PairPool(stores), prompts)


def _prompts(arguments: Arguments, rows: list[PromptRow], store: PairStore) -> EvalPrompts:
    """The prompts of --eval-prompts, which rank 0 has read, beside pairs of this store. Collective."""
    prompts, settings = None, arguments.settings
    file, longest = settings.evaluation.eval_prompts, settings.evaluation.eval_prompt_tokens
    with all_ranks_agree():
        if file and is_rank_zero():
            tokenizer = pair_tokenizer(arguments)
            # The prompt that says nothing has its template's words in chats, and only there.
            chats = store.empty_prompt.tolist() != tokenizer.empty_prompt(chat=False).tolist()
            longest, room = _DEFAULT_ANSWER if longest is None else longest, settings.schedule.seq_length
            prompts = encode_prompts(rows, tokenizer, file, chats=chats, longest=longest, room=room)
    return broadcast(prompts)


def _selected(settings: Settings, loss: LossFunction, pool: PairPool) -> tuple[Selection, Selection, str]:
    """The groups to train on and those held out, as the loss takes them, and what ``PairJob.split`` says of them."""
    split_digest = ""
    if len(pool.stores) > 1:
        train, held_out = map(Selection, (pool.grouping.of_store(0), pool.grouping.of_store(1)))
    else:
        train, held_out = Selection(pool.grouping.of_store(0)), Selection(np.zeros(0, np.int64))
        if share := settings.pairs.eval_share:
            own, seed = settings.pairs.eval_seed, settings.schedule.seed
            split = hold_out(train.ids, pool.prompts.digests(0), share, seed if own is None else own)
            train, held_out = Selection(split.train), Selection(split.held_out, split.notes)
            split_digest = split.digest if split.prompts_repeat or own not in (None, seed) else ""
    if not settings.schedule.evaluates:
        held_out = Selection(held_out.ids[:0], _never_evaluated(settings, len(held_out.ids)))
    named = "--objective reward" if settings.objective.is_reward else f"--preference-loss {loss.spec.name}"
    readers = [
        spec.name for spec in registry.all_specs() if spec.takes == "answers" and not settings.objective.is_reward
    ]
    for selection in (train, held_out):
        if not (loss.spec.takes == "answers" or settings.objective.scored_rows):
            refuse_labelled_answers(pool, selection, named, readers)
        select(pool, selection, loss.spec.select, labelled=loss.requirements.safety)
    return train, held_out, split_digest


def _never_evaluated(settings: Settings, kept_apart: int) -> list[str]:
    """What --eval-iters 0 makes of held-out rows: nothing is read or asked of them."""
    if settings.pairs.eval_pair_data:
        return ["--eval-pair-data is not read, for --eval-iters 0"]
    return [f"{kept_apart} are neither trained on nor evaluated, for --eval-iters 0"] if kept_apart else []


def plan_job(settings: Settings, loss: LossFunction, pool: PairPool, prompts: EvalPrompts | None) -> PairJob:
    """Select and plan.

    Args:
        pool: of the training store alone, or of that and the held-out one.

    Raises:
        UserError: for pairs that cannot be trained on.
    """
    job_checks.check_groups(settings, pool)
    train, held_out, split_digest = _selected(settings, loss, pool)
    sizes, limit = pool.sizes(share_prompts=settings.steps.share_prompts), settings.schedule.seq_length
    for selection in (train, held_out):
        drop_long(pool, selection, sizes, limit, drop=settings.pairs.long_pairs == "drop")
    job_checks.check_selected(settings, loss, pool, train, held_out)
    if not settings.objective.is_reward:
        asked = int(np.isfinite(pool.pairs.margins()[pool.grouping.pairs_of(train.ids)]).sum())
        train.notes += [f"margins of {asked} not read: they are for --objective reward"] if asked else []
    sources = by_source(pool, 0, train.ids)
    for_plan = replace(plan_settings(settings), unit=unit_of_steps(pool))
    attention = pool.attention(share_prompts=settings.steps.share_prompts)
    plan = plan_steps(sizes, for_plan, _steps(settings, sources), sources, costs=attention)
    eval_packs, eval_length = _eval_packs(held_out.ids, sizes, plan, for_plan)
    return PairJob(
        loss=loss,
        pool=pool,
        train=train,
        held_out=held_out,
        split=split_digest,
        plan=plan,
        eval_packs=eval_packs,
        eval_length=eval_length,
        sizes=sizes,
        cache_dir=cache_directory(settings),
        share_prompts=settings.steps.share_prompts,
        resident=settings.reference.is_resident,
        context_parallel=settings.layout.context,
        max_pack_length=settings.schedule.seq_length,
        fixed_length=settings.steps.fixed_pack_length,
        over_pairs=settings.steps.mean_over == "pairs",
        padding_token=_padding_token(settings),
        prompts=prompts,
    )


def _steps(settings: Settings, sources: Sequence[tuple[IntArray, float]]) -> int:
    """Number of optimizer steps: --train-iters, or as many as --pair-epochs come to."""
    steps, epochs = settings.schedule.train_iters, settings.steps.pair_epochs
    if steps is not None:
        return steps
    assert epochs is not None and settings.steps.pairs_per_step, "given: see flags.refusals"
    return max(1, round(epochs * epoch_pairs(sources) / settings.steps.pairs_per_step))


def _padding_token(settings: Settings) -> int | None:
    """That of a reward model's ``config.json``."""
    if not (settings.objective.is_reward and settings.model.hf_model):
        return None
    return padding_token(read_json(Path(settings.model.hf_model) / CONFIG))


def plan_settings(settings: Settings) -> PlanSettings:
    """What the step plan depends on, besides the pairs.

    Raises:
        UserError: no plan can be made of these.
    """
    steps, layout = settings.steps, settings.layout
    return PlanSettings(
        pairs_per_step=steps.pairs_per_step or 0,
        data_parallel=layout.data,
        max_pack_length=settings.schedule.seq_length,
        # Megatron's interleaved schedule takes microbatches in groups of the pipeline's size.
        microbatch_multiple=layout.pipeline if layout.chunks > 1 else 1,
        length_multiple=settings.length_unit,
        pipeline_wait=(layout.pipeline - 1) / layout.chunks,
        seed=settings.schedule.seed,
        pack_pairs=steps.pack_pairs,
        fixed_length=steps.fixed_pack_length,
    )


def _eval_packs(ids: IntArray, sizes: IntArray, plan: StepPlan, settings: PlanSettings) -> tuple[list[IntArray], int]:
    """Held-out groups in packs of one length, and it; as many as the ranks and the schedule can share."""
    if not len(ids):
        return [], plan.longest
    group = settings.data_parallel * settings.microbatch_multiple
    longest = round_up(int(sizes[ids].max()), settings.length_multiple)
    packs = [*ids[:, None], *[ids[:0]] * (-len(ids) % group)]
    if settings.pack_pairs:
        # No longer than the packs of training, if the pairs allow it: they are what has been reckoned to fit.
        packs, longest = pack_evenly(ids, sizes[ids], max(longest, plan.longest), group, settings.length_multiple)
    return packs, settings.max_pack_length if settings.fixed_length else longest
