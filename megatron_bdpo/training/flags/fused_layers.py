"""Whether torch.compile fuses the small functions of Megatron's local layers. Transformer Engine's are fused kernels.

Of Megatron's fusions, those of SwiGLU and of dropout with the residual are compiled functions that need a GPU and
nothing else. Those of the softmax (there is none: attention is over pairs), of rotary embedding and of persistent layer
norms need Apex or Transformer Engine; RMSNorm and LayerNorm are single kernels of torch. Rotary embedding and
zero-centered norms are compiled here.

Gradient accumulation, the product of which is added to ``main_grad`` where it is computed, needs Apex in Megatron's
local linear layers alone: Transformer Engine's have it built in, and so has the output layer's fused kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs.vocab_parallel import apex_accumulates
from megatron_bdpo.platform import cpu
from megatron_bdpo.training.settings import Settings

#: Megatron's arguments that turn on its compiled functions.
_OF_MEGATRON = {"bias_swiglu_fusion": "SwiGLU", "bias_dropout_fusion": "dropout and residual"}


def fusion_arguments(settings: Settings) -> dict[str, object]:
    """Arguments that decide where the user has not; Megatron's flags that were given stay as they are.

    Raises:
        UserError: ``--fuse-local-layers`` where it cannot be honoured.
    """
    reason, wanted = _reason_against(settings), settings.model.fuse_local_layers
    if wanted and reason:
        raise UserError(f"--fuse-local-layers: {reason}. Leave it out: it is on where it works.")
    fuse = not reason if wanted is None else wanted
    decided: dict[str, object] = {"fuse_local_layers": fuse}
    if fuse:
        decided |= dict.fromkeys(_OF_MEGATRON.keys() - settings.given.keys(), True)
    if settings.architecture.implementation == "local" and not apex_accumulates():
        decided["gradient_accumulation_fusion"] = False  # Megatron has a flag against it, and none for it
    return decided


def describe(settings: Settings) -> Iterator[str]:
    """A line on the layers, once the fusions are decided."""
    architecture = settings.architecture
    if architecture.implementation != "local":
        yield "layers: Transformer Engine's"
    elif settings.model.fuse_local_layers:
        fused = {"bias_swiglu_fusion": architecture.fused_swiglu and architecture.swiglu}
        fused["bias_dropout_fusion"] = architecture.fused_dropout
        on = [what for name, what in _OF_MEGATRON.items() if fused[name]]
        yield f"layers: Megatron's local ones; torch.compile fuses {', '.join(['rotary embedding', *on])}"
    elif not settings.dry_run.is_wanted:
        yield f"layers: Megatron's local ones, not fused ({_reason_against(settings) or '--no-fuse-local-layers'})"


def _reason_against(settings: Settings) -> str:
    if settings.architecture.implementation != "local":
        return "Transformer Engine's layers are fused kernels"
    if cpu.is_active():
        return "there is no GPU"
    return "" if importlib.util.find_spec("triton") else "torch.compile needs Triton, which is not installed"
