"""A Hugging Face model as a Megatron checkpoint, for those who want one."""

from __future__ import annotations

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
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.flags.validation import refusals_of_megatron
from megatron_bdpo.training.hf.start import start_from_hugging_face, weights_loader
from megatron_bdpo.training.model_config import model_config
from megatron_bdpo.training.stopping import StopRequest


def import_model(arguments: Arguments) -> None:
    """Write the model of ``--hf-model`` to ``--save``, digests and all. Collective over all ranks, which share it.

    Args:
        arguments: parsed, not validated yet.
    """
    arguments.set(save_interval=1, no_save_optim=True, no_save_rng=True)
    with model_in_memory(arguments) as model, save_seam(ChecksummedSave()):
        save_checkpoint(0, model, None, None, 0, release=True)


@contextlib.contextmanager
def model_in_memory(arguments: Arguments) -> Iterator[list[Any]]:
    """This rank's chunks of the model of ``--hf-model``, with its weights, outside of a run. Collective.

    Args:
        arguments: parsed, not validated yet.
    """
    start_from_hugging_face(arguments)
    length = arguments.settings.schedule.seq_length or 1
    arguments.set(micro_batch_size=1, seq_length=length, max_position_embeddings=length, perform_initialization=False)
    try:
        with all_ranks_agree(), refusals_of_megatron():
            validate_args(arguments.megatron)
        set_global_variables(arguments.megatron, build_tokenizer=False)
        initialize_megatron()
        config = model_config(arguments)
        config.pre_wrap_hooks.append(
            weights_loader(arguments.settings.model.hf_model or "", StopRequest.of(arguments.settings))
        )
        yield config.get_builder_cls()(config).build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
    finally:
        with contextlib.suppress(Exception):  # after a failure at start, some of it was never made
            destroy_global_state()
