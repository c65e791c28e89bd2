"""A Hugging Face model as a Megatron checkpoint, for those who want one."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import validate_args
from megatron.training.checkpointing import save_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.training import destroy_global_state

from megatron_bdpo.platform.seams import initialize_megatron, save_seam
from megatron_bdpo.training.checkpoints import ChecksummedSave
from megatron_bdpo.training.distributed import all_ranks_agree
from megatron_bdpo.training.flags.validation import refusals_of_megatron
from megatron_bdpo.training.hf.start import apply_hf_model, weights_loader
from megatron_bdpo.training.model_config import model_config


def import_model(args: argparse.Namespace) -> None:
    """Write the model of ``--hf-model`` to ``--save``, digests and all. Collective over all ranks, which share it.

    Args:
        args: parsed, not validated yet.
    """
    args.save_interval = 1
    args.no_save_optim = args.no_save_rng = True
    with model_in_memory(args) as model, save_seam(ChecksummedSave()):
        save_checkpoint(0, model, None, None, 0, release=True)


@contextlib.contextmanager
def model_in_memory(args: argparse.Namespace) -> Iterator[list[Any]]:
    """This rank's chunks of the model of ``--hf-model``, with its weights, outside of a run. Collective.

    Args:
        args: parsed, not validated yet.
    """
    apply_hf_model(args)
    args.micro_batch_size = 1
    args.seq_length = args.max_position_embeddings = args.seq_length or 1
    args.perform_initialization = False
    try:
        with all_ranks_agree(), refusals_of_megatron():
            validate_args(args)
        set_global_variables(args, build_tokenizer=False)
        initialize_megatron()
        config = model_config(args)
        config.pre_wrap_hooks.append(weights_loader(args.hf_model))
        yield config.get_builder_cls()(config).build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
    finally:
        with contextlib.suppress(Exception):  # after a failure at start, some of it was never made
            destroy_global_state()
