"""The data side of a run, before Megatron starts: loss, pairs, step plan, and the Megatron arguments that follow."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bdpo.data import pool as pools
from megatron_bdpo.data.bin_packing import pack_evenly, per_pack, round_up
from megatron_bdpo.data.context import ContextRank, imbalance
from megatron_bdpo.data.packs import lay_out
from megatron_bdpo.data.pool import PairPool, Selection
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.prompts import EvalPrompts, PromptRow, encode_prompts, read_prompts
from megatron_bdpo.data.sources import check_sources, parse_sources
from megatron_bdpo.data.step_plan import IntArray, PlanSettings, StepPlan, epoch_pairs, plan_steps
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import PairLossFunction, registry
from megatron_bdpo.model.hf.directory import tokenizer_directory
from megatron_bdpo.training.batches import PackMaker
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero, say
from megatron_bdpo.training.flags.arguments import given_loss_options
from megatron_bdpo.training.flags.precision_check import precision_of
from megatron_bdpo.training.nodes import on_every_node, shared_by_every_node
from megatron_bdpo.training.timetable import settle_intervals


@dataclass(frozen=True)
class PairJob:
    """What is trained on what. The same on every rank.

    Attributes:
        plan: the optimizer steps.
        eval_packs: packs of the held-out pairs, a multiple of the data-parallel ranks; empty without held-out pairs.
        eval_length: the length that all of these have.
        sizes: [P] pack positions of every pair of the pool.
        cache_dir: where tokens and reference values are kept.
        max_pack_length: the longest pack that the user allows; those of the plan may all be shorter.
        fixed_length: no pack is, also where the reference is scored.
        prompts: that the policy answers at every evaluation, if there are any.
    """

    loss: PairLossFunction
    pool: PairPool
    train: Selection
    held_out: Selection
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
    prompts: EvalPrompts | None

    def pack_maker(self, context: ContextRank) -> PackMaker:
        """Makes the packs of training and evaluation, as a context-parallel rank sees them."""
        unconditional = self.resident and self.loss.requirements.comprehension
        return PackMaker(self.pool, self.max_pack_length, self.share_prompts, unconditional, context)

    def pairs_in_use(self, evaluated_after: int | None) -> IntArray:
        """Ids of the pairs that steps and evaluations read, in the order in which they come first.

        Args:
            evaluated_after: steps before the first evaluation; None: there is no evaluation.
        """
        steps, held_out = self.plan.steps, self.held_out.ids[: None if evaluated_after is not None else 0]
        return each_once(steps[:evaluated_after].ravel(), held_out, steps[evaluated_after:].ravel())

    def describe(self) -> list[str]:
        """Loss, pairs and plan in a few lines."""
        plan, lengths = self.plan, self.pool.lengths[self.train.ids].astype(np.int64)
        unshared, shared = int((lengths.sum(axis=1) + lengths[:, 0]).sum()), int(lengths.sum())
        lines = [
            f"loss: {self.loss.describe()}",
            f"pairs: {len(self.train.ids)} to train on, {len(self.held_out.ids)} held out"
            + "".join(f"; {note}" for note in self.train.notes + self.held_out.notes),
            f"plan: {len(plan.steps)} steps of {plan.steps.shape[1]} pairs, each in {plan.data_parallel} ranks x "
            f"{plan.microbatches} packs of {_range(plan.lengths)} positions; fill {plan.fill:.1%}",
        ]
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

    def _describe_context(self) -> str:
        packs = zip(self.plan.packs(0, rank=0), self.plan.lengths[0].tolist(), strict=True)
        laid_out = [
            lay_out([self.pool.group(pair_id) for pair_id in pack], length, share_prompts=self.share_prompts)
            for pack, length in itertools.islice(packs, _PACKS_LOOKED_AT)
        ]
        balance = [imbalance(pack, self.context_parallel) for pack in laid_out]
        return (
            f"{self.context_parallel} ranks share a pack; attention cost max/mean {np.mean(balance):.3f}, "
            f"worst {np.max(balance):.3f}, over the first {len(balance)} packs"
        )


_PACKS_LOOKED_AT = 16


def each_once(*ids: IntArray) -> IntArray:
    """All ids, each where it comes first."""
    every = np.concatenate(ids)
    return every[np.sort(np.unique(every, return_index=True)[1])]


def _range(lengths: IntArray) -> str:
    shortest, longest = int(lengths.min()), int(lengths.max())
    return str(longest) if shortest == longest else f"{shortest} to {longest}"


def build_job(args: argparse.Namespace) -> PairJob:
    """Read, tokenise and plan. Rank 0 does the reading; all ranks open its result. Collective.

    Raises:
        UserError: on every rank, for anything wrong with flags or data.
    """
    with all_ranks_agree():
        loss = PairLossFunction(
            registry.get(args.preference_loss), registry.build_options(args.preference_loss, given_loss_options(args))
        )
        if loss.requirements.all_pairs and args.reference == "resident":
            raise UserError(
                "--reference resident knows no scores before the first step, and an option of the loss is to follow "
                "from them (auto). Give it a value, or leave --reference out."
            )
        _plan_settings(args)  # what is wrong with the plan whatever the pairs: before they are read
    with all_ranks_agree():
        rows = read_prompts(args.eval_prompts) if args.eval_prompts and is_rank_zero() else []
    cache_dir = cache_dir_of(args)
    stores = open_stores(args, cache_dir)
    prompts = _prompts(args, rows, stores[0]) if args.eval_prompts else None
    with all_ranks_agree():
        return _plan_job(args, loss, PairPool(stores), cache_dir, prompts)


def _prompts(args: argparse.Namespace, rows: list[PromptRow], store: PairStore) -> EvalPrompts:
    """The prompts of --eval-prompts, which rank 0 has read, beside pairs of this store. Collective."""
    prompts = None
    with all_ranks_agree():
        if is_rank_zero():
            tokenizer = PairTokenizer(build_tokenizer(args))
            # The prompt that says nothing has its template's words in chats, and only there.
            chats = store.empty_prompt.tolist() != tokenizer.empty_prompt(chat=False).tolist()
            longest = DEFAULT_ANSWER if args.eval_prompt_tokens is None else args.eval_prompt_tokens
            prompts = encode_prompts(
                rows, tokenizer, args.eval_prompts, chats=chats, longest=longest, room=args.seq_length
            )
    return broadcast(prompts)


#: Tokens of an answer to --eval-prompts, at most, unless --eval-prompt-tokens says otherwise.
DEFAULT_ANSWER = 64


def cache_dir_of(args: argparse.Namespace) -> Path:
    """Where tokens and reference values are kept."""
    if args.pair_cache_dir:
        return Path(args.pair_cache_dir)
    return Path(args.save) / "cache" if args.save else Path("runs") / "cache"


def open_stores(args: argparse.Namespace, cache_dir: Path, *, report: bool = True) -> list[PairStore]:
    """The pairs of training and, where they have sources of their own, the held-out ones. Rank 0 reads. Collective.

    Raises:
        UserError: on every rank, for anything wrong with tokenizer or data.
    """
    settings: list[PairDataSettings] = []
    directories: list[str] = []
    with all_ranks_agree():
        for tokens, limit in ((args.pair_data, args.max_pairs), (args.eval_pair_data, None)):
            if tokens:
                settings.append(_data_settings(args, tokens, limit, cache_dir))
                if is_rank_zero():
                    check_sources(settings[-1].sources)
    shared_by_every_node("--pair-cache-dir", cache_dir)
    named = args.tokenizer_model
    with all_ranks_agree():
        if is_rank_zero():
            tokenizer = PairTokenizer(build_tokenizer(args))
            directories = [str(prepare_pairs(each, tokenizer).directory) for each in settings]
    if named:  # Megatron builds it on every rank
        args.tokenizer_model = on_every_node("--tokenizer-model", named, args.tokenizer_model, tokenizer_directory)
    with all_ranks_agree():
        # Every rank maps the files that rank 0 has written: ranks of one node share the pages.
        stores = [
            PairStore.open(directory, sources=each.sources)
            for directory, each in zip(broadcast(directories), settings, strict=True)
        ]
    if report:
        for name, store in zip(("training pairs", "held-out pairs"), stores, strict=False):
            say(name, *store.report.blocks())
    return stores


def _data_settings(args: argparse.Namespace, tokens: list[str], limit: int | None, cache_dir: Path) -> PairDataSettings:
    return PairDataSettings(
        sources=parse_sources(tokens),
        cache_dir=cache_dir,
        max_prompt_tokens=args.max_prompt_length,
        max_response_tokens=args.max_response_length,
        max_pairs=limit,
        max_malformed_share=args.max_malformed_share,
        max_dropped_share=args.max_dropped_share,
    )


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer of these arguments. A name on the hub becomes the directory that it has been fetched to.

    Raises:
        UserError: it cannot be built.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    if args.tokenizer_type == "HuggingFaceTokenizer" and args.tokenizer_model:
        args.tokenizer_model = str(tokenizer_directory(args.tokenizer_model))
    try:
        return build(argparse.Namespace(**vars(args)))  # a copy: it writes the vocabulary size into its argument
    # NameError: its library is not installed; RuntimeError: sentencepiece's, for a file that is no model
    except (ValueError, OSError, TypeError, NameError, ImportError, RuntimeError) as error:
        if isinstance(error, ImportError | NameError):
            advice = "For Hugging Face tokenizers: pip install 'megatron_bdpo[hf]'."
        elif "trust_remote_code" in str(error):
            advice = "It brings code of its own, which is not run unless you trust it: --trust-remote-code."
        else:
            advice = "Name a tokenizer's file or directory, whole, and its type."
        raise UserError(
            f"the tokenizer cannot be built (--tokenizer-type {args.tokenizer_type}, --tokenizer-model "
            f"{args.tokenizer_model}). {advice} Its library says: {' '.join(str(error).split())}"
        ) from error


def _plan_job(
    args: argparse.Namespace, loss: PairLossFunction, pool: PairPool, cache_dir: Path, prompts: EvalPrompts | None
) -> PairJob:
    all_train = pool.store_ids(0)
    if len(pool.stores) > 1:
        train, held_out = Selection(all_train), Selection(pool.store_ids(1))
    else:
        train, held_out = map(Selection, pools.hold_out(all_train, args.eval_share, args.seed))
    for selection in (train, held_out):
        pools.select(pool, selection, loss.spec.select, labelled=loss.requirements.safety)
    sizes = pool.sizes(share_prompts=args.share_prompts)
    for selection in (train, held_out):
        pools.drop_long(pool, selection, sizes, args.seq_length, drop=args.long_pairs == "drop")
    sources = pool.pools(0, train.ids)
    settings = _plan_settings(args)
    steps = args.train_iters
    if steps is None:
        steps = max(1, round(args.pair_epochs * epoch_pairs(sources) / settings.pairs_per_step))
    plan = plan_steps(sizes, settings, steps, sources, costs=sizes**2)  # attention's, nearly
    eval_packs, eval_length = _eval_packs(held_out.ids, sizes, plan, settings)
    return PairJob(
        loss,
        pool,
        train,
        held_out,
        plan,
        eval_packs,
        eval_length,
        sizes,
        cache_dir,
        args.share_prompts,
        args.reference == "resident",
        args.context_parallel_size,
        args.seq_length,
        args.fixed_pack_length,
        prompts,
    )


def _plan_settings(args: argparse.Namespace) -> PlanSettings:
    pipeline = args.pipeline_model_parallel_size
    virtual_stages = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1  # Megatron's, once it has looked
    return PlanSettings(
        pairs_per_step=args.pairs_per_step,
        data_parallel=args.world_size // (args.tensor_model_parallel_size * pipeline * args.context_parallel_size),
        max_pack_length=args.seq_length,
        # Megatron's interleaved schedule takes microbatches in groups of the pipeline's size.
        microbatch_multiple=pipeline if virtual_stages > 1 else 1,
        length_multiple=length_unit(args),
        pipeline_wait=(pipeline - 1) / virtual_stages,
        seed=args.seed,
        pack_pairs=args.pack_pairs,
        fixed_length=args.fixed_pack_length,
    )


def _eval_packs(ids: IntArray, sizes: IntArray, plan: StepPlan, settings: PlanSettings) -> tuple[list[IntArray], int]:
    """Held-out pairs in packs of one length, and it; as many as the ranks and the schedule can share."""
    if not len(ids):
        return [], plan.longest
    group = settings.data_parallel * settings.microbatch_multiple
    longest = round_up(int(sizes[ids].max()), settings.length_multiple)
    packs = [*ids[:, None], *[ids[:0]] * (-len(ids) % group)]
    if settings.pack_pairs:
        # No longer than the packs of training, if the pairs allow it: they are what has been reckoned to fit.
        packs, longest = pack_evenly(ids, sizes[ids], max(longest, plan.longest), group, settings.length_multiple)
    return packs, settings.max_pack_length if settings.fixed_length else longest


def made_up_plan(args: argparse.Namespace) -> StepPlan:
    """A plan of nothing in the shapes a real one could have, for Megatron to validate the other arguments against.

    Whether stages are interleaved is not known yet: the number of packs suits both.
    """
    settings = _plan_settings(args)
    if args.train_iters is not None and args.train_iters < 1:
        raise UserError(f"--train-iters must be at least 1, not {args.train_iters}.")
    steps = np.zeros((args.train_iters or 10**6, 0), np.int64)
    lengths = np.broadcast_to(args.seq_length, (len(steps), args.pipeline_model_parallel_size))
    return StepPlan(steps, steps, lengths, settings.data_parallel, np.zeros(len(steps), np.int64))


def position_shares(args: argparse.Namespace) -> int:
    """Ranks that a pack's positions are split over: context parallelism, times tensor parallelism under SP."""
    return int(args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1))


def length_unit(args: argparse.Namespace) -> int:
    """Packs are multiples of this many positions long, so that each rank's part suits the kernels."""
    return precision_of(args).row_multiple * position_shares(args)


def apply_plan(args: argparse.Namespace, plan: StepPlan, eval_packs: int) -> None:
    """Tell Megatron the shapes that the plan has chosen. To Megatron a sample is a pack, and all are as the longest."""
    evaluate = eval_packs > 0 and args.eval_iters != 0
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    args.seq_length = plan.longest
    args.micro_batch_size = args.eval_micro_batch_size = 1
    args.global_batch_size = plan.packs_per_step
    args.train_iters = len(plan.steps)
    settle_intervals(args)
    args.dataloader_type = "external"
    args.eval_iters = 1 if evaluate else 0
    args.eval_global_batch_size = eval_packs if evaluate else plan.packs_per_step
