"""A run from a Hugging Face model, and to one: its arguments, its weights, and what is written at the end."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import CONFIG, HuggingFaceCheckpoint, read_json
from megatron_bdpo.model.hf.config import Architecture, differences, read_config
from megatron_bdpo.model.hf.directory import model_directory
from megatron_bdpo.model.hf.load import load_weights
from megatron_bdpo.training.distributed import all_ranks_agree, is_rank_zero, say
from megatron_bdpo.training.nodes import on_every_node


def apply_hf_model(args: argparse.Namespace) -> None:
    """Set the arguments that ``--hf-model`` decides, and check that its weights are all there. Collective.

    Raises:
        UserError: on every rank, for a model that cannot be had or used, and for flags that contradict it.
    """
    if not args.hf_model:
        return
    named, weights = args.hf_model, args.dry_run is None
    found: Path | None = None
    with all_ranks_agree():
        if args.pretrained_checkpoint:
            raise UserError("--hf-model and --pretrained-checkpoint both say where the policy starts. Give one.")
        if args.fp8_param_gather or args.fp4_param_gather:
            raise UserError(
                "--fp8-param-gather, --fp4-param-gather: --hf-model is read into bf16 or fp32 weights only."
            )
        if is_rank_zero():
            found = model_directory(named, weights=weights)
    fetch = functools.partial(model_directory, weights=weights)
    args.hf_model = on_every_node("--hf-model", named, str(found), fetch)
    with all_ranks_agree():
        architecture = architecture_of(Path(args.hf_model))
        if architecture.remark:
            say(architecture.remark)
        if args.dry_run is None or any(Path(args.hf_model).glob("*.safetensors")):
            HuggingFaceCheckpoint.open(Path(args.hf_model)).check(architecture.weights.shapes())
        else:
            say(f"weights: not in {args.hf_model}, so not checked")
        _set_arguments(args, architecture)


def architecture_of(directory: Path) -> Architecture:
    """The architecture of a Hugging Face model on disk."""
    try:
        return read_config(read_json(directory / CONFIG))
    except UserError as error:
        raise UserError(f"--hf-model {directory}: {error}") from error


def _set_arguments(args: argparse.Namespace, architecture: Architecture) -> None:
    vocab_size = architecture.weights.sizes.vocab
    given = {name: getattr(args, name) for name in args.given_flags}
    contradicting = differences({**architecture.arguments, "vocab_size": vocab_size}, given)
    if contradicting:
        named = [f"{args.given_flags[line.split(':')[0]]} (given {line.split(': ', 1)[1]})" for line in contradicting]
        raise UserError(f"flags that contradict --hf-model {args.hf_model}. Leave them out: {'; '.join(named)}.")
    vars(args).update(architecture.arguments)
    args.vocab_size = vocab_size
    args.padded_vocab_size = calculate_padded_vocab_size(
        vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
    )
    args.tokenizer_type = args.tokenizer_type or "HuggingFaceTokenizer"
    args.tokenizer_model = args.tokenizer_model or args.hf_model


def vocabulary_size(args: argparse.Namespace, tokenizer: Any) -> int:
    """Entries that log-probs are normalised over: the model's, which may have more than its tokenizer.

    Raises:
        UserError: the tokenizer has tokens that the model has no embedding for.
    """
    size = int(tokenizer.vocab_size)
    if not args.hf_model:
        return size
    if size > args.vocab_size:
        raise UserError(
            f"the tokenizer {args.tokenizer_model} has {size} entries, the model {args.hf_model} {args.vocab_size}. "
            "Use the model's own tokenizer."
        )
    return int(args.vocab_size)


def weights_loader(directory: str | Path) -> Callable[[list[Any]], list[Any]]:
    """A pre-wrap hook that fills model chunks from a Hugging Face model. Collective."""

    def load(model: list[Any]) -> list[Any]:
        with all_ranks_agree():
            checkpoint = HuggingFaceCheckpoint.open(Path(directory))
            load_weights(model, checkpoint, architecture_of(Path(directory)).weights)
        say(f"weights: {directory}, read into this layout")
        return model

    return load
