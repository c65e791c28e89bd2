"""The data side of a run, before Megatron starts: loss, pairs, step plan."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data import pool as pools
from megatron_bdpo.data.bin_packing import pack_evenly, per_pack, round_up
from megatron_bdpo.data.context import ContextRank, imbalance
from megatron_bdpo.data.labels import labelled_sides
from megatron_bdpo.data.packs import lay_out
from megatron_bdpo.data.pool import PairPool, Selection
from megatron_bdpo.data.prompt_kinds import PromptKind
from megatron_bdpo.data.prompts import EvalPrompts, PromptRow, encode_prompts, read_prompts
from megatron_bdpo.data.split import hold_out
from megatron_bdpo.data.step_plan import IntArray, PlanSettings, StepPlan, epoch_pairs, plan_steps
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import PairLossFunction, registry
from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
from megatron_bdpo.model.hf.classifier import padding_token
from megatron_bdpo.training.batches import PackMaker
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.token_stores import cache_directory, open_stores, pair_tokenizer


@dataclass(frozen=True)
class PairJob:
    """What is trained on what. The same on every rank.

    Attributes:
        plan: the optimizer steps.
        train, held_out: groups of the pool.
        split: digest of --eval-share's choice; empty where it follows from the number of pairs and the seed.
        eval_packs: packs of the held-out groups, a multiple of the data-parallel ranks; empty without held-out pairs.
        eval_length: the length that all of these have.
        sizes: [G] pack positions of every group of the pool.
        cache_dir: where tokens and reference values are kept.
        max_pack_length: the longest pack that the user allows; those of the plan may all be shorter.
        fixed_length: no pack is, also where the reference is scored.
        over_pairs: a step's loss is the mean over its pairs; otherwise over its groups, of the mean over their pairs.
        padding_token: of a reward model, the token that no answer ends with; see ``data.packs.lay_out``.
        prompts: that the policy answers at every evaluation, if there are any.
    """

    loss: PairLossFunction
    pool: PairPool
    train: Selection
    held_out: Selection
    split: str
    plan: StepPlan
    eval_packs: list[IntArray]
    eval_length: int
    sizes: IntArray
    cache_dir: Path
    share_prompts: bool
    resident: bool
    context_parallel: int
    max_pack_length: int
    fixed_length: bool
    over_pairs: bool
    padding_token: int | None
    prompts: EvalPrompts | None

    def pack_maker(self, context: ContextRank) -> PackMaker:
        """Makes the packs of training and evaluation, as a context-parallel rank sees them."""
        unconditional = self.resident and self.loss.requirements.comprehension
        return PackMaker(
            self.pool,
            self.max_pack_length,
            self.share_prompts,
            unconditional,
            self.padding_token,
            context,
            self.over_pairs,
            with_tables=self.loss.spec.of_groups,
            with_sides=self.loss.spec.of_answers,
            with_cuts=self.loss.requirements.beginnings,
        )

    @functools.cached_property
    def sizes_after_other(self) -> IntArray:
        """[G] pack positions that each group takes after another group's prompt (``PromptKind.OTHER``)."""
        groups = np.arange(len(self.pool.grouping))
        lengths = self.pool.group_lengths(groups).with_prompts(self.pool.prompts.lengths(groups, PromptKind.OTHER))
        return lengths.positions(share_prompts=self.share_prompts)

    @functools.cached_property
    def fits_after_other(self) -> npt.NDArray[np.bool_]:
        """[G] whether that fits a pack. Groups that do not have no part in what mismatched answers are for."""
        return self.sizes_after_other <= self.max_pack_length

    @functools.cached_property
    def training_pairs(self) -> int:
        """Number of pairs to train on."""
        return len(self.pool.grouping.pairs_of(self.train.ids))

    @property
    def labelled_answers(self) -> tuple[int, int]:
        """Number of desirable and undesirable answers to train on, where pairs are read as such (``data.labels``)."""
        label = self.pool.label[self.pool.grouping.pairs_of(self.train.ids)]
        desirable, undesirable = labelled_sides(label).sum(axis=0).tolist()
        return desirable, undesirable

    @property
    def compared(self) -> int:
        """Number of losses over all training pairs: one for each of them, or for each group."""
        return len(self.train.ids) if self.loss.spec.of_groups else self.training_pairs

    def groups_of_step(self, iteration: int) -> IntArray:
        """Ids of the groups of a step; steps are counted from 1."""
        return self.plan.steps[iteration - 1]

    def counted_in_step(self, iteration: int) -> int:
        """What the mean of a step is over: its groups, or its pairs."""
        groups = self.groups_of_step(iteration)
        return len(self.pool.grouping.pairs_of(groups)) if self.over_pairs else len(groups)

    def groups_in_use(self, evaluated_after: int | None) -> IntArray:
        """Ids of the groups that steps and evaluations read, in the order in which they come first.

        Args:
            evaluated_after: steps before the first evaluation; None: there is no evaluation.
        """
        steps, held_out = self.plan.steps, self.held_out.ids[: None if evaluated_after is not None else 0]
        return each_once(steps[:evaluated_after].ravel(), held_out, steps[evaluated_after:].ravel())

    def describe(self) -> list[str]:
        """Loss, pairs and plan in a few lines."""
        plan, lengths, unit = self.plan, self.pool.group_lengths(self.train.ids), _unit(self.pool)
        unshared, shared = (int(lengths.positions(share_prompts=share).sum()) for share in (False, True))
        lines = [
            f"loss: {self.loss.describe()}",
            f"{self.pool.noun}: {self._counted(self.train)} to train on, {self._counted(self.held_out)} held out"
            + "".join(f"; {note}" for note in self.train.notes + self.held_out.notes),
            f"plan: {len(plan.steps)} steps of {plan.steps.shape[1]} {unit}, each in {plan.data_parallel} ranks "
            f"x {plan.microbatches} packs of {_range(plan.lengths)} positions; fill {plan.fill:.1%}",
        ]
        if unit == "groups":
            over = "pairs" if self.over_pairs else "groups, of the mean over a group's pairs"
            lines.append(f"groups: pairs of one row and prompt; a step's loss is the mean over its {over}")
        if self.loss.spec.of_answers:
            lines.append(self._describe_labels())
        if self.fixed_length:
            fullest = per_pack(self.sizes[plan.steps], plan.pack_of, plan.packs_per_step).max()
            lines.append(f"fixed length of packs: the fullest one of the plan holds {fullest} tokens")
        if self.share_prompts:
            lines.append(f"shared prompts: {1 - shared / unshared:.1%} fewer tokens than one prompt per answer")
        if self.context_parallel > 1:
            lines.append(f"context parallel: {self._describe_context()}")
        if self.prompts:
            lines.append(f"prompts: {self.prompts.describe()}, at every evaluation")
        return lines

    def _describe_labels(self) -> str:
        desirable, undesirable = self.labelled_answers
        pairs, table = self.pool.answers_of(self.train.ids)
        sides = labelled_sides(self.pool.label[pairs])
        both = len(np.intersect1d(*(table.place[sides[:, side], side] for side in (0, 1))))
        named = f"; {both} of them both, chosen in one pair of a row and rejected in another" if both else ""
        return f"answers: {desirable} desirable, {undesirable} undesirable to train on{named}"

    def _counted(self, selection: Selection) -> str:
        pairs = str(len(self.pool.grouping.pairs_of(selection.ids)))
        return f"{pairs} in {len(selection.ids)} groups" if _unit(self.pool) == "groups" else pairs

    def _describe_context(self) -> str:
        packs = zip(self.plan.packs(0, rank=0), self.plan.lengths[0].tolist(), strict=True)
        laid_out = [
            lay_out([self.pool.group(each).group for each in pack], length, share_prompts=self.share_prompts)
            for pack, length in itertools.islice(packs, _PACKS_LOOKED_AT)
        ]
        balance = [imbalance(pack, self.context_parallel) for pack in laid_out]
        return (
            f"{self.context_parallel} ranks share a pack; attention cost max/mean {np.mean(balance):.3f}, "
            f"worst {np.max(balance):.3f}, over the first {len(balance)} packs"
        )


_PACKS_LOOKED_AT = 16


def _unit(pool: PairPool) -> str:
    """What steps are made of, in words."""
    return "groups" if len(pool.grouping) < len(pool) else pool.noun


def each_once(*ids: IntArray) -> IntArray:
    """All ids, none below zero, each where it comes first."""
    every = np.concatenate(ids)
    first = np.zeros(every.max(initial=-1) + 1, np.int64)
    first[every[::-1]] = np.arange(len(every))[::-1]  # of equal indices the last one is kept
    return every[first[every] == np.arange(len(every))]


def _range(lengths: IntArray) -> str:
    shortest, longest = int(lengths.min()), int(lengths.max())
    return str(longest) if shortest == longest else f"{shortest} to {longest}"


def build_job(arguments: Arguments) -> PairJob:
    """Read, tokenise and plan. Rank 0 does the reading; all ranks open its result. Collective.

    Raises:
        UserError: on every rank, for anything wrong with flags or data.
    """
    settings = arguments.settings
    with all_ranks_agree():
        loss = settings.build_loss()
        _check_loss(settings, loss)
        plan_settings(settings)  # what is wrong with the plan whatever the pairs: before they are read
    file = settings.evaluation.eval_prompts
    with all_ranks_agree():
        rows = read_prompts(file) if file and is_rank_zero() else []
    stores = open_stores(arguments)
    prompts = _prompts(arguments, rows, stores[0]) if file else None
    with all_ranks_agree():
        return _plan_job(settings, loss, PairPool(stores), prompts)


def _check_loss(settings: Settings, loss: PairLossFunction) -> None:
    """Refuse what the loss does not read, or reads too early.

    Raises:
        UserError: with the flag.
    """
    if loss.requirements.all_pairs and settings.reference.is_resident:
        raise UserError(
            "--reference resident knows no scores before the first step, and an option of the loss is to follow "
            "from them (auto). Give it a value, or leave --reference out."
        )
    reads_reference = loss.requirements.reference or loss.requirements.comprehension
    needs = loss.requirements
    if settings.reference.is_in_columns and (needs.comprehension or needs.mismatched or not needs.reference):
        others = "the unconditional log-probs too" if needs.comprehension else "those after other prompts too"
        reads = others if needs.comprehension or needs.mismatched else "no reference"
        raise UserError(
            f"--reference columns has the log-probs of answers after their prompts; --preference-loss "
            f"{settings.loss.name} reads {reads}. Leave --reference out."
        )
    if settings.reference.is_in_columns and loss.requirements.beginnings:
        raise UserError(
            "--reference columns has the log-probs of whole answers, and --ld-alpha compares their beginnings, too. "
            "Leave one of them out."
        )
    if loss.spec.of_groups and settings.steps.mean_over:
        raise UserError(
            f"--mean-over {settings.steps.mean_over}: --preference-loss {settings.loss.name} is a loss of groups, and "
            "a step's mean is over them. Leave it out."
        )
    if settings.pairs.unconditional_prompt != "empty" and not loss.requirements.comprehension:
        raise UserError(
            f"--unconditional-prompt is for unconditional log-probs; --preference-loss {settings.loss.name} reads "
            "none. Leave it out."
        )
    if settings.reference.sync_reference_every and not reads_reference:
        raise UserError(
            f"--sync-reference-every moves a reference, and --preference-loss {settings.loss.name} reads none. "
            "Leave it out."
        )
    if settings.reference.reference_model and (settings.reference.is_in_columns or not reads_reference):
        raise UserError(
            "--reference-model names a reference that nobody reads: "
            + ("the rows bring its log-probs. " if reads_reference else "the loss has none. ")
            + "Leave it out."
        )


def _refuse_without_groups(settings: Settings, pool: PairPool) -> None:
    if settings.steps.mean_over and len(pool.grouping) == len(pool):
        raise UserError(
            f"--mean-over {settings.steps.mean_over} makes no difference: no row gives several pairs of one prompt. "
            "Leave it out, or have more pairs made of rows with ranked answers: --pairs-from all."
        )


def _refuse_no_pairs(train: Selection, usable: int, held_out: int) -> None:
    if len(train.ids):
        return
    why = [*train.notes, *([f"{held_out} pairs held out"] if held_out else [])]
    raise UserError(
        f"none of the {usable} usable pairs of --pair-data is left to train on: {'; '.join(why)}. Raise --seq-length, "
        "cut with --max-prompt-length and --max-response-length, hold fewer out, or choose a loss that keeps them."
    )


def _check_columns(pool: PairPool, groups: IntArray) -> None:
    """All pairs of these groups bring their reference's log-probs."""
    ids = pool.grouping.pairs_of(groups)
    missing = np.isnan(pool.reference()[ids]).any(axis=1)
    if missing.any():
        example = pool.describe(int(ids[np.argmax(missing)]))
        raise UserError(
            f"--reference columns: {int(missing.sum())} of {len(ids)} {pool.noun} bring no log-probs ({example}). "
            "Give every pair ref_chosen_logps and ref_rejected_logps, and every labelled answer ref_logps, or leave "
            "--reference out. They are of whole answers: one that a limit of length cuts, or that holds turns of "
            "others, has none."
        )


def _prompts(arguments: Arguments, rows: list[PromptRow], store: PairStore) -> EvalPrompts:
    """The prompts of --eval-prompts, which rank 0 has read, beside pairs of this store. Collective."""
    prompts, settings = None, arguments.settings
    file, longest = settings.evaluation.eval_prompts, settings.evaluation.eval_prompt_tokens
    with all_ranks_agree():
        if file and is_rank_zero():
            tokenizer = pair_tokenizer(arguments)
            # The prompt that says nothing has its template's words in chats, and only there.
            chats = store.empty_prompt.tolist() != tokenizer.empty_prompt(chat=False).tolist()
            longest, room = DEFAULT_ANSWER if longest is None else longest, settings.schedule.seq_length
            prompts = encode_prompts(rows, tokenizer, file, chats=chats, longest=longest, room=room)
    return broadcast(prompts)


#: Tokens of an answer to --eval-prompts, at most, unless --eval-prompt-tokens says otherwise.
DEFAULT_ANSWER = 64


def _selected(settings: Settings, loss: PairLossFunction, pool: PairPool) -> tuple[Selection, Selection, str]:
    """The groups to train on and those held out, as the loss takes them, and what ``PairJob.split`` says of them."""
    split_digest = ""
    if len(pool.stores) > 1:
        train, held_out = map(Selection, (pool.grouping.of_store(0), pool.grouping.of_store(1)))
    else:
        train, held_out = Selection(pool.grouping.of_store(0)), Selection(np.zeros(0, np.int64))
        if share := settings.pairs.eval_share:
            split = hold_out(train.ids, pool.prompts.digests(0), share, settings.schedule.seed)
            train, held_out = Selection(split.train), Selection(split.held_out, split.notes)
            split_digest = split.digest
    if not settings.schedule.evaluates:
        held_out = Selection(held_out.ids[:0], _never_evaluated(settings, len(held_out.ids)))
    named = "--objective reward" if settings.objective.is_reward else f"--preference-loss {loss.spec.name}"
    readers = [spec.name for spec in registry.all_specs() if spec.of_answers and not settings.objective.is_reward]
    for selection in (train, held_out):
        if not loss.spec.of_answers:
            pools.refuse_labelled_answers(pool, selection, named, readers)
        pools.select(pool, selection, loss.spec.select, labelled=loss.requirements.safety)
    return train, held_out, split_digest


def _never_evaluated(settings: Settings, kept_apart: int) -> list[str]:
    """What --eval-iters 0 makes of held-out rows: nothing is read or asked of them."""
    if settings.pairs.eval_pair_data:
        return ["--eval-pair-data is not read, for --eval-iters 0"]
    return [f"{kept_apart} are neither trained on nor evaluated, for --eval-iters 0"] if kept_apart else []


def _plan_job(settings: Settings, loss: PairLossFunction, pool: PairPool, prompts: EvalPrompts | None) -> PairJob:
    _refuse_without_groups(settings, pool)
    train, held_out, split_digest = _selected(settings, loss, pool)
    sizes, limit = pool.sizes(share_prompts=settings.steps.share_prompts), settings.schedule.seq_length
    for selection in (train, held_out):
        pools.drop_long(pool, selection, sizes, limit, drop=settings.pairs.long_pairs == "drop")
    _refuse_no_pairs(train, len(pool.stores[0]), len(pool.grouping.pairs_of(held_out.ids)))
    if loss.requirements.mismatched:
        _ = pool.prompts.other_group  # refuses a single prompt: here, before a model is loaded
    has_several = len(pool.grouping.pairs_of(train.ids)) > len(train.ids)
    if loss.spec.of_step and not loss.spec.of_answers and settings.steps.mean_over != "pairs" and has_several:
        raise UserError(
            f"--preference-loss {loss.spec.name} sorts a step's pairs, each of which is to count alike; in a mean over "
            "rows with several pairs they do not. Add --mean-over pairs."
        )
    if not settings.objective.is_reward:
        asked = int(np.isfinite(pool.margins()[pool.grouping.pairs_of(train.ids)]).sum())
        train.notes += [f"margins of {asked} not read: they are for --objective reward"] if asked else []
    if settings.reference.is_in_columns:
        _check_columns(pool, np.concatenate([train.ids, held_out.ids]))
    sources = pools.by_source(pool, 0, train.ids)
    for_plan = replace(plan_settings(settings), unit=_unit(pool))
    steps, epochs = settings.schedule.train_iters, settings.steps.pair_epochs
    if steps is None:
        assert epochs is not None, "one of both is given: see flags.refusals"
        steps = max(1, round(epochs * epoch_pairs(sources) / for_plan.pairs_per_step))
    attention = pool.attention(share_prompts=settings.steps.share_prompts)
    plan = plan_steps(sizes, for_plan, steps, sources, costs=attention)
    eval_packs, eval_length = _eval_packs(held_out.ids, sizes, plan, for_plan)
    return PairJob(
        loss,
        pool,
        train,
        held_out,
        split_digest,
        plan,
        eval_packs,
        eval_length,
        sizes,
        cache_directory(settings),
        settings.steps.share_prompts,
        settings.reference.is_resident,
        settings.layout.context,
        settings.schedule.seq_length,
        settings.steps.fixed_pack_length,
        settings.steps.mean_over == "pairs",
        _padding_token(settings),
        prompts,
    )


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
