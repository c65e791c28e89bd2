"""Weights of the reference: model chunks that hold them, copied from the policy, saved, loaded.

The reference is a second set of model chunks in the policy's own layout, without gradients, DDP or optimizer. Its
weights are the policy's at the first start; a resumed run loads them from where they were kept, never from the resumed
policy. Only one that moves is in the run's checkpoints, under names of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bdpo.artifact import new_directory, partial_directory
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.model.shards import is_adapter, whole_state
from megatron_bdpo.training.distributed import all_ranks_agree, say

#: Below --save, where the reference's weights are nowhere else.
WEIGHTS_DIR = "reference_weights"


def build_reference(config: PairGPTConfig, *, with_weights: bool = False) -> list[torch.nn.Module]:
    """Model chunks like the policy's, in evaluation mode, without gradients, DDP and optimizer. Collective.

    Args:
        with_weights: those that the configuration's hooks give the policy; else they are undefined.
    """
    without_hooks = copy.copy(config)  # which may hold the whole job
    without_hooks.pre_wrap_hooks = []
    hooks, config = config.pre_wrap_hooks, copy.deepcopy(without_hooks)
    if with_weights:
        config.pre_wrap_hooks += hooks
    else:
        config.transformer.perform_initialization = False
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return chunks


@torch.no_grad()
def copy_policy(policy: list[Any], reference: list[Any]) -> None:
    """Give the reference the policy's weights; both have the same layout, so nothing is communicated."""
    for source, target in zip(unwrap_model(policy), unwrap_model(reference), strict=True):
        for (name, weight), (own_name, own) in zip(
            source.state_dict().items(), target.state_dict(keep_vars=True).items(), strict=True
        ):
            assert name == own_name
            if isinstance(weight, torch.Tensor):
                own.copy_(weight)


@torch.no_grad()
def move_towards(policy: list[Any], reference: list[Any], mix: float) -> None:
    """``mix`` parts of the policy's weights and ``1 - mix`` of the reference's, element by element.

    Computed in fp32, and rounded once to the precision in which the reference is held. Both have the same layout, so
    nothing is communicated. What is no number of floating point is the policy's.
    """
    for source, target in zip(unwrap_model(policy), unwrap_model(reference), strict=True):
        weights = source.state_dict()
        for name, own in target.state_dict(keep_vars=True).items():
            if not isinstance(own, torch.Tensor) or _EXTRA in name:
                continue
            weight = weights[name]
            own.copy_(mix * weight.float() + (1 - mix) * own.float() if own.is_floating_point() else weight)
        target.set_is_first_microbatch()  # Transformer Engine keeps weights in FP8 from one pass to the next


def save_weights(model: list[Any], directory: Path) -> None:
    """Write the weights as a torch_dist checkpoint that any layout can load. Collective."""
    with contextlib.ExitStack() as until_named:
        if torch.distributed.get_rank() == 0:
            until_named.enter_context(new_directory(directory))
        torch.distributed.barrier()
        dist_checkpointing.save(_sharded_weights(model), str(partial_directory(directory)))
        torch.distributed.barrier()
    torch.distributed.barrier()


def checkpoint_loader(directory: Path) -> Callable[[list[Any]], list[Any]]:
    """A pre-wrap hook that fills model chunks from a Megatron checkpoint. Collective."""

    def load(model: list[Any]) -> list[Any]:
        with all_ranks_agree():
            load_weights(model, directory)
        say(f"weights: {directory}, which adapters stand beside")
        return model

    return load


def reference_state(reference: list[Any]) -> dict[str, Any]:
    """A reference's weights for a checkpoint that holds a policy's too: any layout can load them."""
    state = {f"{_MOVED}{key}": value for key, value in _sharded_weights(reference).items()}
    add_prefix_for_sharding(state, _MOVED)
    return state


def load_moved(reference: list[Any], directory: Path) -> None:
    """Load what a checkpoint holds as :func:`reference_state`. Collective.

    Raises:
        UserError: it holds none.
    """
    _load(reference, directory, reference_state(reference), _MOVED)


def load_weights(model: list[Any], directory: Path) -> None:
    """Load weights written by :func:`save_weights`, or the model part of a Megatron checkpoint. Collective.

    Raises:
        UserError: if the directory holds no such checkpoint, naming it.
    """
    _load(model, directory, _sharded_weights(model), "")


def _load(model: list[Any], directory: Path, state: dict[str, Any], prefix: str) -> None:
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except (Exception, CheckpointException) as error:  # many kinds, and one that is no Exception
        raise UserError(f"the weights in {directory} cannot be loaded: {type(error).__name__}: {error}") from error
    for key, chunk in _keys(unwrap_model(model)):
        differing = chunk.load_state_dict(loaded[f"{prefix}{key}"], strict=False)
        if missing := [name for name in differing.missing_keys if _EXTRA not in name]:
            raise UserError(f"the weights in {directory} lack {', '.join(missing[:8])}.")


def _sharded_weights(model: list[Any]) -> dict[str, Any]:
    return {key: _base_state(chunk) for key, chunk in _keys(unwrap_model(model))}


def _base_state(chunk: Any) -> dict[str, Any]:
    """Without what Transformer Engine adds to its layers: no recipe here has a history of scales, and norms that stand
    apart from their linear layers would ask for one that a checkpoint of fused layers does not have."""
    state = whole_state(chunk)
    return {key: value for key, value in state.items() if not is_adapter(key) and _EXTRA not in key}


_EXTRA = "_extra_state"

#: What the names of a moving reference's weights begin with, beside the policy's.
_MOVED = "reference."


def _keys(chunks: list[Any]) -> list[tuple[str, Any]]:
    """Checkpoint keys as Megatron names them: 'model', or 'model0', 'model1'... with virtual stages."""
    return [("model" if len(chunks) == 1 else f"model{index}", chunk) for index, chunk in enumerate(chunks)]
