"""``megatron-bdpo convert``: Hugging Face models to Megatron checkpoints and back, on the CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError


def add_parser(subcommands: Any) -> None:
    """Add ``convert`` and its directions."""
    parser = subcommands.add_parser("convert", help="Hugging Face models to Megatron checkpoints and back")
    directions = parser.add_subparsers(metavar="DIRECTION", required=True)
    _add_export(directions)
    _add_import(directions)


def _add_export(directions: Any) -> None:
    parser = directions.add_parser(
        "export",
        help="a torch_dist checkpoint to a Hugging Face model",
        description="Write the model of a torch_dist checkpoint, whatever layout it was trained in, as a Hugging Face "
        "model. One process; in memory are one layer and one file.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="as given to --save, or one iter_*"
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--hf-model",
        metavar="PATH_OR_NAME",
        help="the model that the training started from: gives configuration, tokenizer, generation settings",
    )
    origin.add_argument("--family", help="for a model that never was one of Hugging Face's: llama, qwen2, ...")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="must not be there yet")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from megatron_bdpo.platform.prepare import prepare_platform

    prepare_platform()
    from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
    from megatron_bdpo.model.hf.hub import model_directory
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.hf import exporting as hf_export

    with process_groups(_ONE_PROCESS):
        if options.hf_model:
            original = model_directory(options.hf_model)
            config = read_json(original / CONFIG)
        else:
            original, config = None, hf_export.config_of(options.checkpoint, options.family)
        hf_export.export_checkpoint(options.checkpoint, options.output, config, original)
    print(f"{options.output}: complete")


_ONE_PROCESS = argparse.Namespace(
    distributed_backend="gloo",
    fake_process_group=False,
    world_size=1,
    rank=0,
    local_rank=0,
    distributed_timeout_minutes=10,
)


def _add_import(directions: Any) -> None:
    parser = directions.add_parser(
        "import",
        help="a Hugging Face model to a torch_dist checkpoint",
        description="Write a Hugging Face model as a torch_dist checkpoint that --pretrained-checkpoint takes in any "
        "layout. The whole model has to fit in memory; under torchrun, its ranks share it by tensor parallelism. "
        "Training does not need this: it reads --hf-model directly.",
    )
    parser.add_argument("--hf-model", required=True, metavar="PATH_OR_NAME")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="must not be there yet")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights (bf16)")
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> None:
    from megatron_bdpo.platform.prepare import prepare_platform

    prepare_platform()
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.flags import arguments
    from megatron_bdpo.training.hf.importing import import_model

    if options.output.exists():
        raise UserError(f"{options.output} is there already. Remove it, or name another directory.")
    precision = [] if options.dtype == "fp32" else [f"--{options.dtype}"]
    args = arguments.parse(["--hf-model", options.hf_model, "--save", str(options.output), *precision])
    args.tensor_model_parallel_size = args.world_size
    with process_groups(args):
        import_model(args)
    if args.rank == 0:
        print(f"{options.output}: complete")
