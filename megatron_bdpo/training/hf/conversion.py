"""Conversions without a run: a checkpoint to a Hugging Face model in one process, and back on any number of ranks."""

from __future__ import annotations

from pathlib import Path

from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
from megatron_bdpo.model.hf.directory import model_directory
from megatron_bdpo.model.hf.export import refuse_existing
from megatron_bdpo.training.distributed import process_groups
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.hf.exporting import config_of, export_checkpoint
from megatron_bdpo.training.hf.importing import import_model
from megatron_bdpo.training.megatron_settings import ProcessSettings

_ONE_PROCESS = ProcessSettings(rank=0, local_rank=0, ranks=1, backend="gloo", timeout_minutes=10, is_made_up=False)


def export_alone(
    checkpoint: Path, output: Path, hf_model: str | None, family: str | None, *, compare_digests: bool
) -> None:
    """Write a torch_dist checkpoint as a Hugging Face model, as one of ``hf_model``'s kind or of a ``family``."""
    with process_groups(_ONE_PROCESS):
        if hf_model:
            original = model_directory(hf_model)
            config = read_json(original / CONFIG)
        else:
            original, config = None, config_of(checkpoint, family or "")
        export_checkpoint(checkpoint, output, config, original, compare_digests=compare_digests)


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
