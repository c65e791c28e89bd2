"""Whether a model fits a parallel layout, checked before anything else; if not, which layout near it would do.

Megatron finds most of these out too, one at a time and after minutes of data preparation.
"""

from __future__ import annotations

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.layout import Divisible
from megatron_bdpo.training.settings import Settings


def check_layout(settings: Settings) -> None:
    """Refuse a layout that cannot work.

    Raises:
        UserError: with every reason, and the nearest layout on as many ranks that works.
    """
    layout, shape = settings.layout.sizes, divisible(settings)
    problems = list(shape.problems(layout))
    if problems:
        nearest, sizes = shape.nearest(layout), shape.tensor_sizes()
        lines = ["this model does not fit this layout:", *(f"  {problem}" for problem in problems)]
        if sizes and layout.tensor not in (1, *sizes):
            lines.append(f"--tensor-model-parallel-size of this model: 1 or {', '.join(map(str, sizes))}.")
        if nearest:
            lines.append(f"The nearest that works on {shape.ranks} ranks: {nearest}.")
        raise UserError("\n".join(lines))
    if settings.architecture.implementation == "local":
        for what, rows in settings.architecture.latents.items():
            if rows % layout.tensor:
                raise UserError(
                    f"Megatron's local layers divide the matrix to the {what} ({rows} rows) over the tensor-parallel "
                    f"ranks, {layout.tensor} here. Use a --tensor-model-parallel-size that divides it."
                )
    model, experts_over = settings.architecture, settings.layout.expert_tensor or layout.tensor
    if model.experts and model.biases and experts_over > 1:
        raise UserError(
            "experts with biases (gpt-oss) are whole on a rank. Add --expert-tensor-parallel-size 1, and divide them "
            "with --expert-model-parallel-size."
        )
    if settings.architecture.experts and layout.tensor > 1 and not settings.layout.sequence_parallel:
        raise UserError("Megatron trains experts with tensor parallelism only under --sequence-parallel. Add it.")


def divisible(settings: Settings) -> Divisible:
    """What of the job a layout has to divide."""
    layout, model = settings.layout, settings.architecture
    is_uneven = (
        layout.first_layers
        or layout.last_layers
        or layout.embedding_as_layer
        or layout.loss_as_layer
        or layout.pipeline_layout
    )
    ffn = model.ffn or 0
    return Divisible(
        ranks=layout.ranks,
        layers=0 if is_uneven else model.layers,
        layers_per_chunk=0 if is_uneven else layout.layers_per_chunk or 0,
        heads=model.heads,
        groups=model.groups,
        ffn=0 if model.experts else ffn,  # layers between those of experts are Megatron's to check
        experts=model.experts or 0,
        expert_ffn=model.expert_ffn or ffn,
        expert_tensor=layout.expert_tensor or 0,
        shares_groups=not settings.lora.is_wanted,
    )
