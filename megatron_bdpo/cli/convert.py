"""``megatron-bdpo convert``: Hugging Face models to Megatron checkpoints and back, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click

from megatron_bdpo.cli.common import PATH, example, only_one
from megatron_bdpo.display import show
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.entry import prepare_platform


@click.group("convert", epilog=example("megatron-bdpo convert export --checkpoint RUN --hf-model MODEL --output DIR"))
def convert() -> None:
    """Hugging Face models to Megatron checkpoints and back."""


@convert.command(
    "export", epilog=example("megatron-bdpo convert export --checkpoint RUN --hf-model MODEL --output DIR")
)
@click.option("--checkpoint", type=PATH, required=True, metavar="DIR", help="As given to --save, or one iter_*.")
@click.option(
    "--hf-model",
    metavar="PATH_OR_NAME",
    help="The model that the training started from: gives configuration, tokenizer, generation settings.",
)
@click.option("--family", help="For a model that never was one of Hugging Face's: llama, qwen2, ...")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Must not be there yet.")
@click.option(
    "--push-to-hub", metavar="NAME", help="Send it to this repository too, made private; HF_TOKEN is the token."
)
@click.option(
    "--checkpoint-checksums/--no-checkpoint-checksums",
    default=True,
    show_default=True,
    help="Compare all of its files with its integrity.json first, the optimizer's too.",
)
def export(
    checkpoint: Path,
    hf_model: str | None,
    family: str | None,
    output: Path,
    push_to_hub: str | None,
    checkpoint_checksums: bool,
) -> None:
    """Write a torch_dist checkpoint as a Hugging Face model.

    Whatever layout it was trained in. One process; in memory are one file and one tensor.
    """
    only_one(hf_model=hf_model, family=family)
    conversion = _conversion()
    with _written(output):
        pushed = conversion.export_alone(
            checkpoint, output, hf_model, family, compare_digests=checkpoint_checksums, push_to_hub=push_to_hub
        )
    show(f"{output}: complete", *([f"pushed to {pushed}"] if pushed else []))


@convert.command("merge", epilog=example("megatron-bdpo convert merge --adapters DIR --hf-model MODEL --output MERGED"))
@click.option(
    "--adapters", type=PATH, required=True, metavar="DIR", help="As PEFT writes them, or a checkpoint of a LoRA run."
)
@click.option("--hf-model", required=True, metavar="PATH_OR_NAME", help="The model that they stand beside.")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Must not be there yet.")
def merge(adapters: Path, hf_model: str, output: Path) -> None:
    """Write a Hugging Face model with LoRA adapters merged into its weights.

    One process; in memory are the adapters and one file of the model.
    """
    conversion = _conversion()
    with _written(output):
        conversion.merge_alone(adapters, hf_model, output)
    show(f"{output}: complete")


def _conversion() -> ModuleType:
    prepare_platform()
    from megatron_bdpo.training.hf import conversion  # imports Megatron, for which the platform has to be prepared

    return conversion


@contextlib.contextmanager
def _written(output: Path) -> Iterator[None]:
    """In the block, what the operating system refuses about ``output`` is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error


@convert.command("import", epilog=example("megatron-bdpo convert import --hf-model MODEL --output DIR"))
@click.option("--hf-model", required=True, metavar="PATH_OR_NAME")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Must not be there yet.")
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True, help="Of the weights."
)
def import_(hf_model: str, output: Path, dtype: str) -> None:
    """Write a Hugging Face model as a torch_dist checkpoint.

    --pretrained-checkpoint takes it in any layout. The whole model has to fit in memory; under torchrun, its ranks
    share it by tensor parallelism. Training does not need this: it reads --hf-model directly.
    """
    conversion = _conversion()
    with _written(output):
        is_first = conversion.import_on_all_ranks(hf_model, output, dtype)
    if is_first:
        show(f"{output}: complete")
