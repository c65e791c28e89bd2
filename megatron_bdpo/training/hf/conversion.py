"""Conversions without a run: a checkpoint to a Hugging Face model in one process, and back on any number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_bdpo.artifact import new_directory
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.card import TrainingFacts, model_card
from megatron_bdpo.model.hf.checkpoint import CONFIG, INDEX, HuggingFaceCheckpoint, read_json
from megatron_bdpo.model.hf.directory import model_directory
from megatron_bdpo.model.hf.export import refuse_existing, write_companions, write_file
from megatron_bdpo.model.hf.push import make_repository, push_directory
from megatron_bdpo.model.lora import peft_format
from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.model.lora.merging import merged
from megatron_bdpo.training import identity
from megatron_bdpo.training.checkpoints import refuse_damaged
from megatron_bdpo.training.distributed import process_groups
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.adapter_files import say_other_base, stored_adapters
from megatron_bdpo.training.hf.exporting import config_of, export_checkpoint, stored_facts
from megatron_bdpo.training.hf.importing import import_model
from megatron_bdpo.training.hf.start import architecture_of
from megatron_bdpo.training.megatron_settings import ProcessSettings

_ONE_PROCESS = ProcessSettings(rank=0, local_rank=0, ranks=1, backend="gloo", timeout_minutes=10, is_made_up=False)


def export_alone(
    checkpoint: Path,
    output: Path,
    hf_model: str | None,
    family: str | None,
    *,
    compare_digests: bool,
    push_to_hub: str | None = None,
) -> str:
    """Write a torch_dist checkpoint as a Hugging Face model, as one of ``hf_model``'s kind or of a ``family``.

    Returns:
        Where it has been pushed to; empty where to nowhere.
    """
    repository = make_repository(push_to_hub) if push_to_hub else ""
    with process_groups(_ONE_PROCESS):
        if hf_model:
            original = model_directory(hf_model)
            config = read_json(original / CONFIG)
        else:
            original, config = None, config_of(checkpoint, family or "")
        export_checkpoint(checkpoint, output, config, original, compare_digests=compare_digests)
    return push_directory(output, repository) if repository else ""


def merge_alone(adapters: Path, hf_model: str, output: Path) -> None:
    """Write a Hugging Face model with adapters merged into its weights, one of its files after the other.

    Args:
        adapters: as PEFT writes them, or a torch_dist checkpoint of a run with adapters.

    Raises:
        UserError: there are none, or they are of another model.
    """
    refuse_existing(output)
    original = model_directory(hf_model)
    with process_groups(_ONE_PROCESS):
        config, tensors, facts = _adapters_in(adapters, original)
    base = HuggingFaceCheckpoint.open(original)
    dtype = None
    with new_directory(output) as directory:
        for file in sorted({stored.file for stored in base.tensors.values()}):
            named = [name for name, stored in base.tensors.items() if stored.file == file]
            weights = {name: base.rows(name, 0, base.tensors[name].shape[0]) for name in named}
            dtype = weights[named[0]].dtype
            write_file(
                directory / file.name, {name: merged(name, weights.pop(name), tensors, config) for name in named}
            )
        if (original / INDEX).is_file():
            shutil.copyfile(original / INDEX, directory / INDEX)
        write_companions(directory, read_json(original / CONFIG), dtype, original, model_card(facts))
    base.close()


def _adapters_in(directory: Path, original: Path) -> tuple[LoraConfig, Mapping[str, Tensor], TrainingFacts]:
    """Adapters by PEFT's names, and what is known of the run that made them."""
    weights = architecture_of(original).weights
    if (directory / peft_format.CONFIG).is_file():
        say_other_base(directory, str(original))
        config = peft_format.read_config(directory)
        expected = peft_format.adapter_map(weights, config)
        stored = peft_format.open_weights(directory, expected)
        tensors = {name: stored.rows(name, 0, shape[0]) for name, shape in expected.shapes().items()}
        return config, tensors, TrainingFacts(base_model=str(original))
    checkpoint = identity.checkpoint_directory(str(directory)) or directory
    arguments = identity.stored_arguments(checkpoint)
    if not identity.identity_in(arguments).get("lora"):
        raise UserError(f"the checkpoint {checkpoint} holds a model. megatron-bdpo convert export writes it.")
    refuse_damaged(checkpoint)
    config, tensors = stored_adapters(checkpoint, str(original), arguments)
    return config, tensors, stored_facts(checkpoint)


def import_on_all_ranks(hf_model: str, output: Path, dtype: str) -> bool:
    """Write a Hugging Face model as a torch_dist checkpoint. Collective: ranks share it by tensor parallelism.

    Args:
        dtype: of the weights: bf16, fp16 or fp32.

    Returns:
        Whether this rank is the first.
    """
    refuse_existing(output)
    precision = [] if dtype == "fp32" else [f"--{dtype}"]
    arguments = Arguments.parse(["--hf-model", hf_model, "--save", str(output), *precision])
    process = arguments.settings.process
    arguments.set(tensor_model_parallel_size=process.ranks)
    with process_groups(process):
        import_model(arguments)
    return process.rank == 0
