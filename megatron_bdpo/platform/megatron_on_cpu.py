"""The few places of Megatron that reach the GPU past ``torch.cuda``, on the CPU. Patched by ``cpu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import token_dispatcher

#: Megatron's own loop of the process that writes for --async-save.
write_checkpoints = PersistentAsyncCaller.async_loop


def patch(checkpoint_writer: Callable[..., None]) -> None:
    """Patch them for the life of this process.

    Args:
        checkpoint_writer: in the place of :func:`write_checkpoints`, which it calls.
    """
    _patch_random()
    _patch_experts()
    _patch_uneven_collectives()
    PersistentAsyncCaller.async_loop = staticmethod(checkpoint_writer)
    FileSystemWriterAsync.preload_tensors = staticmethod(_copy_to_host)


def _patch_random() -> None:
    # The tensor-parallel RNG tracker reaches the CUDA generator through the C API, not through torch.cuda.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_experts() -> None:
    # all_to_all wants its split sizes as numbers. Megatron makes them so when it brings them to the host, but leaves
    # alone what is there already.
    on_gpu = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = on_gpu(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    token_dispatcher.maybe_move_tensor_to_cpu = move


def _patch_uneven_collectives() -> None:
    # Tensor-parallel experts gather and scatter as many tokens as each rank has; gloo wants equal parts.
    gather_equal, scatter_equal = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(tensor: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None:
            return gather_equal(tensor, group, None, use_global_buffer)
        longest = max(output_split_sizes)
        if longest == 0:
            return tensor
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = gather_equal(padded, group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter(tensor: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None:
            return scatter_equal(tensor, group, None, use_global_buffer)
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


def _copy_to_host(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """What training waits for before it goes on. On a GPU it is a copy to the host; a tensor that is there already is
    not copied, and the writer would share it with the optimizer's next step."""
    return [
        (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (data, tensors) in write_buckets
    ]
