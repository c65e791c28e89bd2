"""What a run is, in the lines that it begins with: model, layout, loss, pairs, plan, precision, memory, directories."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_bdpo.display import Facts
from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import GB, fullest
from megatron_bdpo.planning.model import Split, stage_parameters
from megatron_bdpo.training.flags import fused_layers, precision_check
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.job_memory import job_shape, model_shape


def summarize(args: argparse.Namespace, job: PairJob) -> Facts:
    """All of it, of validated arguments; the same for a run and for its dry run."""
    lines = [f"model: {_model(args)}", f"layout: {layout(args)}", *job.describe(), *precision_check.describe(args)]
    lines += fused_layers.describe(args)
    lines += [*memory(args, job), *_places(args)]
    return Facts.of(lines)


def _model(args: argparse.Namespace) -> str:
    try:
        shape = model_shape(args)
    except UserError:  # of a kind whose parameters are not counted
        return f"{args.num_layers} layers of {args.hidden_size}"
    count = stage_parameters(shape, Split(layout=Layout(1, 1, 1)), 0).total
    written = next(f"{count / unit:.3g} {name}" for unit, name in _UNITS if count >= unit)
    return (
        f"{shape.layers} layers of {shape.hidden}, {shape.heads} heads, vocabulary {shape.vocab}; {written} parameters"
    )


_UNITS = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (1, ""))


def layout(args: argparse.Namespace) -> str:
    """Sizes of the parallel groups."""
    replica = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "virtual stages": args.virtual_pipeline_model_parallel_size or 1,
        "context": args.context_parallel_size,
        "data": args.world_size // replica,
        "expert": args.expert_model_parallel_size,
    }
    return " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1) or "one rank"


def memory(args: argparse.Namespace, job: PairJob) -> Iterator[str]:
    """The estimate for the fullest GPU, by part; or why there is none."""
    try:
        estimate = fullest(model_shape(args), job_shape(args, job))
    except UserError as error:
        yield f"memory: {error}"
        return
    stage = f", stage {estimate.stage}" if args.pipeline_model_parallel_size > 1 else ""
    yield f"memory: {estimate.total / GB:.1f} GB on the fullest GPU{stage}; estimated, see docs/layouts.md"
    yield "  " + ", ".join(f"{part} {size / GB:.1f}" for part, size in estimate.parts.items() if size)


def _places(args: argparse.Namespace) -> Iterator[str]:
    if args.save:
        resumes = "; goes on from what is there" if args.load == args.save else ""
        yield f"kept in: {args.save}, {_how_often(args)}{resumes}"
    else:
        yield "kept in: nowhere (--save DIR --save-interval STEPS)"
    if args.save_hf:
        yield f"Hugging Face model at the end: {args.save_hf}"


def _how_often(args: argparse.Namespace) -> str:
    """When checkpoints are written, and which stay."""
    often = [f"every {args.save_every_minutes:g} minutes"] if args.save_every_minutes is not None else []
    if "save_interval" in args.given_flags:
        often.append(f"every {args.save_interval} steps")
    kept = [f"the newest {args.keep_checkpoints or 1}"] if args.keep_checkpoints or args.save_retain_interval else []
    if args.save_retain_interval:
        kept.append(f"those of every {args.save_retain_interval} steps")
    return " and ".join(often) + (f", of which {' and '.join(kept)} stay" if kept else "")
