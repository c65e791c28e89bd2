"""Whether torch.compile fuses the small functions of Megatron's local layers. Transformer Engine's are fused kernels.

Of Megatron's fusions, those of SwiGLU and of dropout with the residual are compiled functions that need a GPU and
nothing else. Those of the softmax (there is none: attention is over pairs), of rotary embedding and of persistent layer
norms need Apex or Transformer Engine; RMSNorm and LayerNorm are single kernels of torch. Rotary embedding and
zero-centered norms are compiled here.

Gradient accumulation, the product of which is added to ``main_grad`` where it is computed, needs Apex in Megatron's
local linear layers alone: Transformer Engine's have it built in, and so has the output layer's fused kernel.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator

from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs.vocab_parallel import apex_accumulates
from megatron_bdpo.platform import cpu

#: Megatron's arguments that turn on its compiled functions.
_OF_MEGATRON = {"bias_swiglu_fusion": "SwiGLU", "bias_dropout_fusion": "dropout and residual"}


def settle_fusions(args: argparse.Namespace) -> None:
    """Decide where the user has not; Megatron's flags that were given stay as they are.

    Raises:
        UserError: ``--fuse-local-layers`` where it cannot be honoured.
    """
    reason = _reason_against(args)
    if args.fuse_local_layers and reason:
        raise UserError(f"--fuse-local-layers: {reason}. Leave it out: it is on where it works.")
    if args.fuse_local_layers is None:
        args.fuse_local_layers = not reason
    if args.fuse_local_layers:
        for name in _OF_MEGATRON.keys() - args.given_flags.keys():
            setattr(args, name, True)
    if args.transformer_impl == "local" and not apex_accumulates():
        args.gradient_accumulation_fusion = False  # Megatron has a flag against it, and none for it


def describe(args: argparse.Namespace) -> Iterator[str]:
    """A line on the layers, of settled arguments."""
    if args.transformer_impl != "local":
        yield "layers: Transformer Engine's"
    elif args.fuse_local_layers:
        on = [
            what for name, what in _OF_MEGATRON.items() if getattr(args, name) and (args.swiglu or "swiglu" not in name)
        ]
        yield f"layers: Megatron's local ones; torch.compile fuses {', '.join(['rotary embedding', *on])}"
    elif args.dry_run is None:
        yield f"layers: Megatron's local ones, not fused ({_reason_against(args) or '--no-fuse-local-layers'})"


def _reason_against(args: argparse.Namespace) -> str:
    if args.transformer_impl != "local":
        return "Transformer Engine's layers are fused kernels"
    if cpu.is_active():
        return "there is no GPU"
    return "" if importlib.util.find_spec("triton") else "torch.compile needs Triton, which is not installed"
