"""The precision that Megatron's flags ask for, and whether model, layout and device can have it."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator

import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.attention_backends import DESCRIPTIONS, Layer, check_backend, default_backend, why_slow
from megatron_bdpo.model.precision import FP8_CAPABILITIES, FP8_MULTIPLES, Precision
from megatron_bdpo.platform import cpu


def precision_of(args: argparse.Namespace) -> Precision:
    """What the run computes in. Before or after Megatron's validation."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return Precision(dtype, str(getattr(args.fp8_recipe, "value", args.fp8_recipe)) if args.fp8 else None)


def check_precision(args: argparse.Namespace) -> None:
    """Refuse FP8 that cannot work, and an attention backend that cannot. A dry run asks nothing of this machine.

    Raises:
        UserError: with every reason.
    """
    precision = precision_of(args)
    problems = list(_problems(args, precision)) if precision.fp8_recipe else []
    if problems:
        raise UserError("\n".join(["FP8 cannot work here:", *(f"  {problem}" for problem in problems)]))
    if args.pair_attention != "auto" and args.dry_run is None:
        for layer in _attention_layers(args):
            check_backend(args.pair_attention, not cpu.is_active(), precision.dtype, layer)


def describe(args: argparse.Namespace) -> Iterator[str]:
    """Precision and attention, a line each, and what is slow about it."""
    precision = precision_of(args)
    chosen = args.pair_attention
    if args.dry_run is not None and chosen == "auto":
        return  # the job is to run elsewhere
    yield f"precision: {precision}"
    here = (not cpu.is_active(), precision.dtype)
    layers = _attention_layers(args)
    backends = {layer: default_backend(*here, layer) if chosen == "auto" else chosen for layer in layers}
    yield "attention: " + "; in layers with a window ".join(
        DESCRIPTIONS[name] for name in dict.fromkeys(backends.values())
    )
    if chosen == "auto":
        yield from filter(None, dict.fromkeys(why_slow(backends[layer], *here, layer) for layer in layers))


def _attention_layers(args: argparse.Namespace) -> list[Layer]:
    """The kinds of layer that the model has, those without a window first."""
    from megatron_bdpo.model.attention import window_of  # here, as it imports Megatron

    head_size = args.kv_channels or args.hidden_size // args.num_attention_heads
    windows = {window_of(args, number) for number in range(1, args.num_layers + 1)}
    return [Layer(head_size, head_size**-0.5, window) for window in sorted(windows, key=lambda window: window or -1)]


def _problems(args: argparse.Namespace, precision: Precision) -> Iterator[str]:
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
    if args.fp8_param_gather and args.reference == "resident":
        yield "--fp8-param-gather: a resident reference copies half-precision weights. Use --reference precomputed."
    if args.tp_comm_overlap:
        yield from _problems_of_overlap(args, recipe)
    if misfits := precision.misfits(matrix_sides(args)):
        yield f"--fp8-recipe {recipe}: these sides of a rank's weight matrices do not fit it: {', '.join(misfits)}."
    if args.dry_run is None:
        yield from _problems_of_this_machine(recipe)


def _problems_of_overlap(args: argparse.Namespace, recipe: str) -> Iterator[str]:
    """What ``fill_userbuffers_buffer_for_all_gather`` of Transformer Engine (2.14 to 2.20) raises in the first step."""
    shares = args.tensor_model_parallel_size * args.context_parallel_size
    if recipe == "blockwise":
        yield "--tp-comm-overlap: Transformer Engine's buffers know no blockwise tensors. Use --fp8-recipe tensorwise."
    if recipe == "mxfp8" and args.seq_length % (128 * shares):
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


def matrix_sides(args: argparse.Namespace) -> dict[str, int]:
    """The sides of a rank's weight matrices inside the layers, by what they are."""
    tensor = args.tensor_model_parallel_size
    heads = args.num_attention_heads
    head_size = args.kv_channels or args.hidden_size // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    sides = {
        "hidden size": args.hidden_size,
        "queries, keys and values": (heads + 2 * max(groups, tensor)) * head_size // tensor,
        "attention output": heads * head_size // tensor,
    }
    ffn = args.ffn_hidden_size
    if args.num_experts:
        expert_ffn = args.moe_ffn_hidden_size or ffn
        if expert_ffn:
            sides["expert MLP"] = expert_ffn // (args.expert_tensor_parallel_size or tensor)
    elif ffn:
        sides["MLP"] = ffn // tensor
    return sides
