"""For passes outside of training steps: evaluation mode, and weights that nothing gathers meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel


@contextlib.contextmanager
def weights_at_rest(model: list[Any]) -> Iterator[None]:
    """For passes outside of training steps: the weights are all there, and nothing gathers them layer by layer.

    With ``--overlap-param-gather`` each layer's first use would start to gather the next layers' weights, and leave a
    gathering behind that the first training step does not expect.
    """
    gathering = [
        chunk for chunk in model if isinstance(chunk, DistributedDataParallel) and chunk.remove_forward_pre_hook_handles
    ]
    for chunk in gathering:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        yield
    finally:
        for chunk in gathering:
            chunk.enable_forward_pre_hook()


@contextlib.contextmanager
def weights_gathered(model: list[Any]) -> Iterator[None]:
    """Right after a step: the weights are all there. Collective.

    With ``--overlap-param-gather`` each data-parallel rank has updated a part of them, and the next step's forward pass
    would gather the rest.
    """
    gathering = [
        chunk for chunk in model if isinstance(chunk, DistributedDataParallel) and chunk.remove_forward_pre_hook_handles
    ]
    for chunk in gathering:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in gathering:
            chunk.enable_forward_pre_hook()


@contextlib.contextmanager
def evaluating(model: list[Any]) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode afterwards."""
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
