"""A job's memory, from Megatron's arguments: what ``planning`` is to be told of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.activations import Recompute
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import KEPT_BYTES, JobShape
from megatron_bdpo.planning.model import ModelShape, Split
from megatron_bdpo.training.flags.precision_check import precision_of
from megatron_bdpo.training.job import PairJob, build_tokenizer

#: Pipelines that are split in ways not reckoned with.
_UNEVEN = ("account_for_embedding_in_pipeline_split", "pipeline_model_parallel_layout")

_ADAM = "adam"


def model_shape(args: argparse.Namespace) -> ModelShape:
    """The model of validated arguments.

    Raises:
        UserError: its memory is not estimated.
    """
    return ModelShape.from_arguments(vars(args), args.scored_vocab_size)


def job_shape(args: argparse.Namespace, job: PairJob) -> JobShape:
    """What else memory depends on, of validated arguments, with the plan's packs and the data's share of prompts.

    Raises:
        UserError: it is not estimated for these settings.
    """
    unreckoned = [f"--{name.replace('_', '-')}" for name in _UNEVEN if getattr(args, name)]
    if args.optimizer != _ADAM or args.optimizer_cpu_offload or args.use_precision_aware_optimizer:
        unreckoned.append("optimizers other than Adam in fp32 on the GPU")
    if unreckoned:
        raise UserError(f"memory is not estimated with {', '.join(unreckoned)}.")
    prompts, *answers = job.pool.lengths[job.train.ids].sum(axis=0, dtype=np.int64)
    tokens = int(prompts + sum(answers))
    fill = job.plan.fill
    return JobShape(
        ranks=args.world_size,
        split=Split(
            layout=Layout(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.context_parallel_size,
                args.expert_model_parallel_size,
            ),
            chunks=args.virtual_pipeline_model_parallel_size or 1,
            first_layers=args.decoder_first_pipeline_num_layers,
            last_layers=args.decoder_last_pipeline_num_layers,
            loss_as_layer=args.account_for_loss_in_pipeline_split,
            expert_tensor=args.expert_tensor_parallel_size or 0,
        ),
        pack_length=job.plan.longest,
        microbatches=job.plan.microbatches,
        precision=precision(args),
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 or precision(args) == "fp32" else 2,
        recompute=_recompute(args),
        resident=job.resident,
        fused_log_probs=args.log_probs == "fused",
        kept_softmax_bytes=KEPT_BYTES if args.log_prob_kept_mib is None else args.log_prob_kept_mib * 2**20,
        # Without a GPU local layers are chosen for the user; the job is to run on one.
        fused_layers=not (args.transformer_impl == "local" and "transformer_impl" in args.given_flags),
        keys=fill * ((3 * prompts + sum(answers)) / tokens if job.share_prompts else 1.0),
        scored_share=fill * sum(answers) / (tokens if job.share_prompts else tokens + int(prompts)),
    )


def precision(args: argparse.Namespace) -> str:
    """bf16, fp16, fp32 or fp8."""
    found = precision_of(args)
    return "fp8" if found.fp8_recipe else str(found)


def _recompute(args: argparse.Namespace) -> Recompute:
    if args.recompute_granularity is None:
        return Recompute()
    return Recompute(
        granularity=args.recompute_granularity,
        modules=frozenset(args.recompute_modules or {"core_attn"}),
        method=args.recompute_method or "uniform",
        layers=args.recompute_num_layers or 1,
    )


def of_recipe(recipes: Sequence[str]) -> tuple[ModelShape, dict[str, Any]]:
    """The model of a recipe, and what else of it a plan depends on.

    Raises:
        UserError: the recipe cannot be used, or has no model.
    """
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from megatron_bdpo.training.flags import arguments
    from megatron_bdpo.training.hf.start import architecture_of, model_directory

    words = [word for recipe in recipes for word in ("--recipe", recipe)]
    # A plan needs no data and writes nothing: the recipe's variables for these need not be set.
    args = arguments.parse([*words, "--pair-data", "", "--save", "", "--load", ""])
    told = {"seq_length": args.seq_length, "pairs_per_step": args.pairs_per_step, "reference": args.reference}
    told["precision"] = precision(args)
    told = {name: value for name, value in told.items() if value}
    if args.hf_model:
        architecture = architecture_of(Path(model_directory(args.hf_model, weights=False)))
        return ModelShape.from_arguments(architecture.arguments, architecture.weights.sizes.vocab), told
    if not args.num_layers or not args.tokenizer_type:
        raise UserError("the recipe names neither an --hf-model nor a model's flags and its tokenizer.")
    vocab = args.vocab_size or int(build_tokenizer(args).vocab_size)
    return ModelShape.from_arguments(vars(args), vocab), told
