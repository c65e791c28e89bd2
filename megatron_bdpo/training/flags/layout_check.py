"""Whether a model fits a parallel layout, checked before anything else; if not, which layout near it would do.

Megatron finds most of these out too, one at a time and after minutes of data preparation.
"""

from __future__ import annotations

import argparse

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.layout import Divisible, Layout


def check_layout(args: argparse.Namespace) -> None:
    """Refuse a layout that cannot work.

    Raises:
        UserError: with every reason, and the nearest layout on as many ranks that works.
    """
    layout = Layout(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
        args.expert_model_parallel_size,
    )
    shape = divisible(args)
    problems = list(shape.problems(layout))
    if problems:
        nearest, sizes = shape.nearest(layout), shape.tensor_sizes()
        lines = ["this model does not fit this layout:", *(f"  {problem}" for problem in problems)]
        if sizes and layout.tensor not in (1, *sizes):
            lines.append(f"--tensor-model-parallel-size of this model: 1 or {', '.join(map(str, sizes))}.")
        if nearest:
            lines.append(f"The nearest that works on {shape.ranks} ranks: {nearest}.")
        raise UserError("\n".join(lines))
    if args.num_experts and layout.tensor > 1 and not args.sequence_parallel:
        raise UserError("Megatron trains experts with tensor parallelism only under --sequence-parallel. Add it.")


def divisible(args: argparse.Namespace) -> Divisible:
    """What of the job a layout has to divide."""
    is_uneven = (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
        or args.pipeline_model_parallel_layout
    )
    ffn = args.ffn_hidden_size or 0
    return Divisible(
        ranks=args.world_size,
        layers=0 if is_uneven else args.num_layers,
        layers_per_chunk=0 if is_uneven else args.num_layers_per_virtual_pipeline_stage or 0,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        ffn=0 if args.num_experts else ffn,  # layers between those of experts are Megatron's to check
        experts=args.num_experts or 0,
        expert_ffn=args.moe_ffn_hidden_size or ffn,
        expert_tensor=args.expert_tensor_parallel_size or 0,
    )
