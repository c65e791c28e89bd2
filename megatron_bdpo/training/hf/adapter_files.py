"""Adapters in PEFT's format: a run's start from them, its end, and those of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bdpo.artifact import new_directory
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.card import TrainingFacts, model_card
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint, read_json
from megatron_bdpo.model.hf.config import Architecture
from megatron_bdpo.model.hf.export import refuse_existing, write_file, write_json
from megatron_bdpo.model.hf.file_layout import lay_out
from megatron_bdpo.model.hf.stored import StoredWeights
from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.model.lora.moving import gather_adapters, load_adapters, names_of, with_whole_magnitudes
from megatron_bdpo.model.lora.peft_format import (
    BASE_FILE,
    CONFIG,
    WEIGHTS,
    adapter_map,
    base_json,
    base_of,
    config_json,
    open_weights,
    refuse_targets,
)
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, host_group, is_rank_zero, say
from megatron_bdpo.training.hf.start import architecture_of
from megatron_bdpo.training.identity import checkpoint_directory, identity_in, stored_arguments
from megatron_bdpo.training.settings import Settings


def adapters_loader(settings: Settings, config: LoraConfig) -> Callable[[list[Any]], list[Any]]:
    """A pre-wrap hook that fills a model's adapters from those of --lora-start. Collective.

    Args:
        config: theirs.
    """
    directory = Path(settings.lora.lora_start or "")

    def load(model: list[Any]) -> list[Any]:
        with all_ranks_agree():
            weights = adapter_map(_architecture(settings).weights, config)
            load_adapters(model, open_weights(directory, weights), weights)
        say(f"adapters: {directory}")
        say_other_base(directory, settings.model.hf_model or "")
        return model

    return load


def check_targets(settings: Settings, config: LoraConfig) -> None:
    """Refuse adapters that PEFT's format has no place for, before anything is built."""
    if settings.model.hf_model:
        refuse_targets(_architecture(settings).weights, config)


def expected_base(settings: Settings) -> str:
    """Fingerprint of the weights that the adapters to start from were trained beside, of --lora-start or of a
    checkpoint; "" where nothing tells, or these weights were of another type than here. Collective.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    dtype, directories, found = str(settings.precision.dtype), settings.directories, ""
    checkpoint = checkpoint_directory(directories.load if directories.finetune else None)
    with all_ranks_agree():
        if is_rank_zero() and settings.lora.lora_start:
            found = base_of(Path(settings.lora.lora_start), dtype)
        elif is_rank_zero() and checkpoint:
            arguments = stored_arguments(checkpoint)
            same_type = str(arguments.get("params_dtype")) == dtype
            found = identity_in(arguments).get("base_weights", "") if same_type else ""
    return broadcast(found)


def say_other_base(directory: Path, base: str) -> None:
    """Warn where a directory of PEFT's names another model than the one that its adapters are put beside."""
    named = str(read_json(directory / CONFIG).get("base_model_name_or_path") or "")
    if named and Path(named).name != Path(base).name:
        say(f"WARNING: the adapters in {directory} say that they stand beside {named}, and here it is {base}")


def save_adapters(
    model: list[Any], target: Path, settings: Settings, config: LoraConfig, base: str, facts: TrainingFacts,
    before_naming: Callable[[Path], None],
) -> None:  # fmt: skip
    """Write a policy's adapters as PEFT does. Collective; rank 0 writes.

    Args:
        model: the chunks, unwrapped.
        base: fingerprint of the weights that they stand beside.
        before_naming: called on rank 0 with the finished directory before it gets its name.

    Raises:
        UserError: on every rank; it cannot be written.
    """
    weights = _architecture(settings).weights
    tensors = gather_adapters(model, adapter_map(weights, config), host_group())
    about = base_json(base, str(settings.precision.dtype))
    with all_ranks_agree():
        if tensors:
            content = config_json(config, weights, settings.model.hf_model or "")
            _write(target, content, tensors, model_card(facts, library="peft"), about, before_naming)


def export_adapters(directory: Path, target: Path, hf_model: str, arguments: Mapping[str, Any], card: str) -> None:
    """Write the adapters of a checkpoint as PEFT does. In one process.

    Args:
        directory: of the checkpoint.
        arguments: that it was written with.

    Raises:
        UserError: they cannot be read or written.
    """
    config, tensors = stored_adapters(directory, hf_model, arguments)
    content = config_json(config, architecture_of(Path(hf_model)).weights, hf_model)
    about = base_json(identity_in(arguments)["base_weights"], str(arguments["params_dtype"]))
    _write(target, content, tensors, card, about, lambda directory: None)


def stored_adapters(
    directory: Path, hf_model: str, arguments: Mapping[str, Any]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapters of a checkpoint by PEFT's names. In one process.

    Args:
        directory: of the checkpoint.
        hf_model: directory of the model that they stand beside.
        arguments: that it was written with.

    Raises:
        UserError: they cannot be read, or are of another model.
    """
    config = LoraConfig(**identity_in(arguments)["lora"])
    adapters = adapter_map(architecture_of(Path(hf_model)).weights, config)
    stored = StoredWeights(directory, adapters)
    (file,) = lay_out(stored.wholes, adapters, file_bytes=1 << 62)
    tensors = names_of(stored.together([file]), adapters)
    return config, with_whole_magnitudes(tensors, HuggingFaceCheckpoint.open(Path(hf_model)))


def _write(
    target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str, about: Mapping[str, str],
    before_naming: Callable[[Path], None],
) -> None:  # fmt: skip
    refuse_existing(target)
    try:
        with new_directory(target) as directory:
            write_file(directory / WEIGHTS, tensors)
            write_json(directory / CONFIG, config)
            write_json(directory / BASE_FILE, about)
            (directory / "README.md").write_text(card, "utf-8")
            before_naming(directory)
    except OSError as error:
        raise UserError(f"the adapters cannot be written to {target}: {error}. Make room there.") from error


def _architecture(settings: Settings) -> Architecture:
    return architecture_of(Path(settings.model.hf_model or ""))
