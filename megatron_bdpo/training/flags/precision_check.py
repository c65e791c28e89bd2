"""The precision that Megatron's flags ask for, and whether model, layout and device can have it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.attention import window_of
from megatron_bdpo.model.attention_backends import DESCRIPTIONS, check_backend, default_backend, why_slow
from megatron_bdpo.model.attention_layer import Layer
from megatron_bdpo.model.precision import FP8_CAPABILITIES, FP8_MULTIPLES, Precision
from megatron_bdpo.platform import cpu
from megatron_bdpo.training.settings import Settings


def check_precision(settings: Settings) -> None:
    """Refuse FP8 that cannot work, and an attention backend that cannot. A dry run asks nothing of this machine.

    Raises:
        UserError: with every reason.
    """
    precision = settings.precision
    problems = list(_problems(settings, precision)) if precision.fp8_recipe else []
    if problems:
        raise UserError("\n".join(["FP8 cannot work here:", *(f"  {problem}" for problem in problems)]))
    if settings.model.pair_attention != "auto" and not settings.dry_run.is_wanted:
        for layer in _attention_layers(settings):
            check_backend(settings.model.pair_attention, not cpu.is_active(), precision.dtype, layer)


def describe(settings: Settings) -> Iterator[str]:
    """Precision and attention, a line each, and what is slow about it."""
    precision = settings.precision
    chosen = settings.model.pair_attention
    if settings.dry_run.is_wanted and chosen == "auto":
        return  # the job is to run elsewhere
    yield f"precision: {precision}"
    here = (not cpu.is_active(), precision.dtype)
    layers = _attention_layers(settings)
    backends = {layer: default_backend(*here, layer) if chosen == "auto" else chosen for layer in layers}
    yield "attention: " + "; in layers with a window ".join(
        DESCRIPTIONS[name] for name in dict.fromkeys(backends.values())
    )
    if chosen == "auto":
        yield from filter(None, dict.fromkeys(why_slow(backends[layer], *here, layer) for layer in layers))


def _attention_layers(settings: Settings) -> list[Layer]:
    """The kinds of layer that the model has, those without a window first."""
    model = settings.architecture
    windows = {window_of(model, number) for number in range(1, model.layers + 1)}
    head_size, value_size = model.head_size, model.value_size if model.multi_latent else None
    return [
        Layer(
            head_size,
            settings.layers.attention_scale or head_size**-0.5,
            window,
            value_size,
            softcap=settings.layers.attention_softcap,
            sinks=model.softmax_type != "vanilla",
        )
        for window in sorted(windows, key=lambda window: window or -1)
    ]


def _problems(settings: Settings, precision: Precision) -> Iterator[str]:
    recipe = str(precision.fp8_recipe)
    if recipe == "delayed":
        # Transformer Engine updates the scales of all modules of the process, and only where gradients are enabled.
        yield (
            "--fp8-recipe delayed (Megatron's default): its scales are a history of training steps, which a frozen "
            "reference has not, and which Transformer Engine does not load from a checkpoint. Use tensorwise or "
            "blockwise."
        )
        return
    if recipe not in FP8_MULTIPLES:
        yield f"--fp8-recipe {recipe}: what it asks of shapes is not known. Use {', '.join(FP8_MULTIPLES)}."
        return
    if precision.dtype != torch.bfloat16:
        yield "add --bf16: it is the precision of everything that is not FP8."
    if settings.memory.fp8_param_gather and settings.reference.is_resident:
        yield "--fp8-param-gather: a resident reference copies half-precision weights. Use --reference precomputed."
    if settings.layout.tp_comm_overlap:
        yield from _problems_of_overlap(settings, recipe)
    if misfits := precision.misfits(matrix_sides(settings)):
        yield f"--fp8-recipe {recipe}: these sides of a rank's weight matrices do not fit it: {', '.join(misfits)}."
    if not settings.dry_run.is_wanted:
        yield from _problems_of_this_machine(recipe)


def _problems_of_overlap(settings: Settings, recipe: str) -> Iterator[str]:
    """What ``fill_userbuffers_buffer_for_all_gather`` of Transformer Engine (2.14 to 2.20) raises in the first step."""
    shares = settings.layout.tensor * settings.layout.context
    if recipe == "blockwise":
        yield "--tp-comm-overlap: Transformer Engine's buffers know no blockwise tensors. Use --fp8-recipe tensorwise."
    if recipe == "mxfp8" and settings.schedule.seq_length % (128 * shares):
        yield (
            f"--tp-comm-overlap: with mxfp8 each rank's part of a pack has to be a multiple of 128. Use a --seq-length "
            f"that is a multiple of {128 * shares}."
        )


def _problems_of_this_machine(recipe: str) -> Iterator[str]:
    needed = FP8_CAPABILITIES[recipe]
    if cpu.is_active():
        yield "there is no GPU."
    elif torch.cuda.get_device_capability() < needed:
        yield f"--fp8-recipe {recipe}: it needs compute capability {'.'.join(map(str, needed))} or more."
    if importlib.util.find_spec("transformer_engine") is None:
        yield "Transformer Engine is not installed (pip install '.[gpu]')."


def matrix_sides(settings: Settings) -> dict[str, int]:
    """The sides of a rank's weight matrices inside the layers, by what they are."""
    model, tensor = settings.architecture, settings.layout.tensor
    sides = {
        "hidden size": model.hidden,
        "queries, keys and values": (model.heads + 2 * max(model.groups, tensor)) * model.head_size // tensor,
        "attention output": model.heads * model.head_size // tensor,
    }
    if model.multi_latent:
        heads = model.heads // tensor
        sides = {
            "hidden size": model.hidden,
            "queries": heads * model.head_size,
            **model.latents,
            "latent of keys and values": model.latent,
            "keys and values": heads * (model.plain_part + model.value_size),
            "attention output": heads * model.value_size,
        }
    ffn = model.ffn
    if model.experts:
        expert_ffn = model.expert_ffn or ffn
        if expert_ffn:
            sides["expert MLP"] = expert_ffn // (settings.layout.expert_tensor or tensor)
    elif ffn:
        sides["MLP"] = ffn // tensor
    return sides
