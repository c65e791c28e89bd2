"""A run from a Hugging Face model, and to one: its arguments, its weights, and what is written at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
from megatron_bdpo.model.hf.classifier import classifier_of
from megatron_bdpo.model.hf.config import Architecture, differences, read_config
from megatron_bdpo.model.hf.directory import model_directory
from megatron_bdpo.model.hf.family import REWARD_HEAD
from megatron_bdpo.model.hf.load import load_weights
from megatron_bdpo.model.initialization import initialize_by_name
from megatron_bdpo.training.distributed import all_ranks_agree, is_rank_zero, say
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.nodes import on_every_node
from megatron_bdpo.training.phases import phase
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.stopping import StopRequest


def start_from_hugging_face(arguments: Arguments) -> None:
    """Set the arguments that ``--hf-model`` decides, and check that its weights are all there. Collective.

    Raises:
        UserError: on every rank, for a model that cannot be had or used, and for flags that contradict it.
    """
    settings = arguments.settings
    named, weights = settings.model.hf_model, not settings.dry_run.is_wanted
    with all_ranks_agree():
        refuse_revision_alone(settings)
    if not named:
        return
    found: Path | None = None
    with all_ranks_agree():
        if settings.directories.pretrained_checkpoint:
            raise UserError("--hf-model and --pretrained-checkpoint both say where the policy starts. Give one.")
        if settings.memory.fp8_param_gather or settings.memory.fp4_param_gather:
            raise UserError(
                "--fp8-param-gather, --fp4-param-gather: --hf-model is read into bf16 or fp32 weights only."
            )
        if is_rank_zero():
            found = model_directory(named, settings.model.hf_revision, weights=weights)
    fetch = functools.partial(model_directory, weights=weights)
    directory = Path(on_every_node("--hf-model", named, str(found), fetch))
    arguments.set(hf_model=str(directory))
    with all_ranks_agree():
        architecture = architecture_of(directory, reward_models=settings.objective.is_reward)
        if settings.objective.is_reward:
            classifier_of(architecture.family)  # refuses families that transformers could not load again
        if architecture.remark:
            say(architecture.remark)
        if settings.lora.is_wanted and (why := architecture.family.no_adapters):
            raise UserError(
                f"--hf-model {directory}: no adapters for models of the family '{architecture.family.model_type}': "
                f"{why}. Leave --lora-rank and --lora-start out: all weights are trained then."
            )
        if weights or any(directory.glob("*.safetensors")):
            architecture.open_weights(directory).check(architecture.weights.shapes(), left_out=architecture.left_out)
        else:
            say(f"weights: not in {directory}, so not checked")
        arguments.set(**_arguments(arguments, architecture))


def refuse_revision_alone(settings: Settings) -> None:
    """Refuse --hf-revision of nothing."""
    if settings.model.hf_revision is not None and not settings.model.hf_model:
        raise UserError("--hf-revision is a revision of --hf-model, which is not given. Leave it out, or name a model.")


def architecture_of(directory: Path, *, reward_models: bool = False) -> Architecture:
    """The architecture of a Hugging Face model on disk; ``reward_models`` as ``read_config`` has it."""
    try:
        return read_config(read_json(directory / CONFIG), reward_models=reward_models)
    except UserError as error:
        raise UserError(f"--hf-model {directory}: {error}") from error


def _arguments(arguments: Arguments, architecture: Architecture) -> dict[str, object]:
    """What a model decides.

    Raises:
        UserError: a flag says otherwise.
    """
    settings, vocab_size = arguments.settings, architecture.weights.sizes.vocab
    hf_model, tokenizer = settings.model.hf_model, settings.tokenizer
    decided = {**architecture.arguments, "vocab_size": vocab_size}
    contradicting = differences(decided, arguments.given_values)
    if contradicting:
        named = [f"{arguments.given[line.split(':')[0]]} (given {line.split(': ', 1)[1]})" for line in contradicting]
        raise UserError(f"flags that contradict --hf-model {hf_model}. Leave them out: {'; '.join(named)}.")
    padded = calculate_padded_vocab_size(
        vocab_size, settings.architecture.vocab_multiple, settings.layout.tensor, logging_enabled=False
    )
    return {
        **decided,
        "padded_vocab_size": padded,
        "tokenizer_type": tokenizer.type or "HuggingFaceTokenizer",
        "tokenizer_model": tokenizer.model or hf_model,
    }


def vocabulary_size(settings: Settings, tokenizer: Any) -> int:
    """Entries that log-probs are normalised over: the model's, which may have more than its tokenizer.

    Raises:
        UserError: the tokenizer has tokens that the model has no embedding for.
    """
    size, own, hf_model = int(tokenizer.vocab_size), settings.architecture.vocab_size, settings.model.hf_model
    if not hf_model or own is None:
        return size
    if size > own:
        raise UserError(
            f"the tokenizer {settings.tokenizer.model} has {size} entries, the model {hf_model} {own}. Use the model's "
            "own tokenizer."
        )
    return own


def weights_loader(
    directory: str | Path, stop: StopRequest, *, head_seed: int | None = None
) -> Callable[[list[Any]], list[Any]]:
    """A pre-wrap hook that fills model chunks from a Hugging Face model; it may raise StopRequested. Collective.

    Args:
        head_seed: of chunks with a scalar head. From a language model, which has none, it is drawn with this seed, the
            same in every layout.
    """

    def load(model: list[Any]) -> list[Any]:
        with phase("weights"):
            with all_ranks_agree(), stop.working_alone():
                architecture = architecture_of(Path(directory), reward_models=head_seed is not None)
                opened = architecture.open_weights(Path(directory))
                is_drawn = head_seed is not None and not architecture.is_reward_model
                left = {REWARD_HEAD} if is_drawn else ()
                load_weights(model, opened, architecture.weights, stop.leave_alone_if_asked, left)
                if is_drawn:
                    initialize_by_name(model, head_seed or 0, only={REWARD_HEAD})
            stop.leave_together()
        say(f"weights: {directory}, read into this layout")
        return model

    return load
