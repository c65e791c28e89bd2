"""A job's memory, from Megatron's arguments: what ``planning`` is to be told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.directory import model_directory
from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.model.precision import Precision
from megatron_bdpo.planning.activations import Recompute
from megatron_bdpo.planning.adapters import Adapters
from megatron_bdpo.planning.memory import KEPT_BYTES, JobShape
from megatron_bdpo.planning.model import ModelShape, Split
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.start import architecture_of
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.lora import lora_config
from megatron_bdpo.training.megatron_settings import MemorySettings
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.token_stores import build_tokenizer

_ADAM = "adam"


def model_shape(arguments: Arguments) -> ModelShape:
    """The model of validated arguments.

    Raises:
        UserError: its memory is not estimated.
    """
    return ModelShape.from_arguments(vars(arguments.megatron), arguments.scored_vocab_size)


def job_shape(settings: Settings, job: PairJob) -> JobShape:
    """What else memory depends on, of validated arguments, with the plan's packs and the data's share of prompts.

    Raises:
        UserError: it is not estimated for these settings.
    """
    layout, memory = settings.layout, settings.memory
    uneven = {
        "--account-for-embedding-in-pipeline-split": layout.embedding_as_layer,
        "--pipeline-model-parallel-layout": layout.pipeline_layout,
    }
    unreckoned = [flag for flag, value in uneven.items() if value]
    if memory.optimizer != _ADAM or memory.optimizer_cpu_offload or memory.use_precision_aware_optimizer:
        unreckoned.append("optimizers other than Adam in fp32 on the GPU")
    if unreckoned:
        raise UserError(f"memory is not estimated with {', '.join(unreckoned)}.")
    lengths = job.pool.group_lengths(job.train.ids)
    answers, tokens = int(lengths.answer_tokens.sum()), int(lengths.positions(share_prompts=True).sum())
    unshared = int(lengths.positions(share_prompts=False).sum())
    fill, kept = job.plan.fill, settings.log_probs.kept_bytes
    lora = lora_config(settings)
    return JobShape(
        ranks=layout.ranks,
        split=Split(
            layout=layout.sizes,
            chunks=layout.chunks,
            first_layers=layout.first_layers,
            last_layers=layout.last_layers,
            loss_as_layer=layout.loss_as_layer,
            expert_tensor=layout.expert_tensor or 0,
        ),
        pack_length=job.plan.longest,
        microbatches=job.plan.microbatches,
        precision=_precision(settings.precision),
        sequence_parallel=layout.sequence_parallel,
        distributed_optimizer=memory.use_distributed_optimizer,
        gradient_bytes=4 if memory.fp32_gradients or settings.precision.dtype == torch.float32 else 2,
        recompute=_recompute(memory),
        # Beside adapters it is the policy without them, unless it has weights of its own.
        resident=job.resident and (not lora or bool(settings.reference.reference_model)),
        adapters=adapters_shape(lora),
        fused_log_probs=settings.log_probs.log_probs == "fused",
        kept_softmax_bytes=KEPT_BYTES if kept is None else kept,
        # Without a GPU local layers are chosen for the user; the job is to run on one.
        fused_layers=not (settings.architecture.implementation == "local" and "transformer_impl" in settings.given),
        # A shared prompt's keys are read by itself and by each of its answers.
        keys=fill * ((int(lengths.prompt.sum()) + unshared) / tokens if job.share_prompts else 1.0),
        scored_share=fill * answers / (tokens if job.share_prompts else unshared),
    )


def adapters_shape(lora: LoraConfig | None) -> Adapters | None:
    """What of adapters memory depends on."""
    if lora is None:
        return None
    return Adapters(rank=lora.rank, targets=lora.targets, dora=lora.kind == "dora", dropout=bool(lora.dropout))


def _precision(precision: Precision) -> str:
    """bf16, fp16, fp32 or fp8."""
    return "fp8" if precision.fp8_recipe else str(precision)


def _recompute(memory: MemorySettings) -> Recompute:
    if memory.recompute_granularity is None:
        return Recompute()
    return Recompute(
        granularity=memory.recompute_granularity,
        modules=frozenset(memory.recompute_modules or {"core_attn"}),
        method=memory.recompute_method or "uniform",
        layers=memory.recompute_num_layers or 1,
    )


def of_recipe(recipes: Sequence[str]) -> tuple[ModelShape, dict[str, Any]]:
    """The model of a recipe, and what else of it a plan depends on. After ``platform.boot``.

    Raises:
        UserError: the recipe cannot be used, or has no model.
    """
    words = [word for recipe in recipes for word in ("--recipe", recipe)]
    # A plan needs no data and writes nothing: the recipe's variables for these need not be set.
    arguments = Arguments.parse([*words, "--pair-data", "", "--save", "", "--load", ""])
    settings = arguments.settings
    told: dict[str, Any] = {
        "seq_length": settings.schedule.seq_length,
        "pairs_per_step": settings.steps.pairs_per_step,
        "reference": settings.reference.reference,
        "precision": _precision(settings.precision),
    }
    model = _model_of(arguments)
    gated = replace(settings.architecture, swiglu=model.gated)  # an --hf-model's, which is not among the arguments yet
    told["adapters"] = adapters_shape(lora_config(replace(settings, architecture=gated)))
    return model, {name: value for name, value in told.items() if value}


def _model_of(arguments: Arguments) -> ModelShape:
    settings = arguments.settings
    if settings.model.hf_model:
        directory = model_directory(settings.model.hf_model, settings.model.hf_revision, weights=False)
        architecture = architecture_of(directory)
        return ModelShape.from_arguments(architecture.arguments, architecture.weights.sizes.vocab)
    if not settings.architecture.layers or not settings.tokenizer.type:
        raise UserError("the recipe names neither an --hf-model nor a model's flags and its tokenizer.")
    vocab = settings.architecture.vocab_size or int(build_tokenizer(arguments).vocab_size)
    return ModelShape.from_arguments(vars(arguments.megatron), vocab)
