"""What a run is, in the lines that it begins with: model, layout, loss, pairs, plan, precision, memory, directories."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bdpo.display import Facts
from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.adapters import adapter_parameters
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import GB, fullest
from megatron_bdpo.planning.model import Split, stage_parameters
from megatron_bdpo.training.flags import fused_layers, precision_check
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.job_memory import adapters_shape, job_shape, model_shape
from megatron_bdpo.training.lora import lora_config
from megatron_bdpo.training.megatron_settings import LayoutSettings
from megatron_bdpo.training.reporting.job_description import describe_job
from megatron_bdpo.training.settings import Settings


def summarize(arguments: Arguments, job: PairJob) -> Facts:
    """All of it, of validated arguments; the same for a run and for its dry run."""
    settings = arguments.settings
    lines = [f"model: {_model(arguments)}", *_adapters(arguments)]
    lines += [f"layout: {layout(settings.layout)}", *describe_job(job)]
    lines += [*precision_check.describe(settings), *fused_layers.describe(settings)]
    lines += [*memory(arguments, job), *_places(settings)]
    return Facts.of(lines)


def _model(arguments: Arguments) -> str:
    try:
        shape = model_shape(arguments)
    except UserError:  # of a kind whose parameters are not counted
        architecture = arguments.settings.architecture
        return f"{architecture.layers} layers of {architecture.hidden}"
    count = _rounded(stage_parameters(shape, _ALONE, 0).total)
    return f"{shape.layers} layers of {shape.hidden}, {shape.heads} heads, vocabulary {shape.vocab}; {count} parameters"


def _adapters(arguments: Arguments) -> Iterator[str]:
    adapters = adapters_shape(lora_config(arguments.settings))
    if not adapters:
        return
    try:
        count = _rounded(adapter_parameters(model_shape(arguments), _ALONE, adapters, 0).total)
    except UserError:  # as above
        yield f"trained: {adapters}; the model is frozen"
        return
    yield f"trained: {adapters}, {count} parameters; the model is frozen"


def _rounded(count: int) -> str:
    return next(f"{count / unit:.3g} {name}" for unit, name in _UNITS if count >= unit).rstrip()


_ALONE = Split(layout=Layout(1, 1, 1))


_UNITS = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (1, ""))


def layout(layout: LayoutSettings) -> str:
    """Sizes of the parallel groups."""
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual stages": layout.chunks,
        "context": layout.context,
        "data": layout.data,
        "expert": layout.expert,
    }
    return " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1) or "one rank"


def memory(arguments: Arguments, job: PairJob) -> Iterator[str]:
    """The estimate for the fullest GPU, by part; or why there is none."""
    settings = arguments.settings
    try:
        estimate = fullest(model_shape(arguments), job_shape(settings, job))
    except UserError as error:
        yield f"memory: {error}"
        return
    stage = f", stage {estimate.stage}" if settings.layout.pipeline > 1 else ""
    yield f"memory: {estimate.total / GB:.1f} GB on the fullest GPU{stage}; estimated, see docs/layouts.md"
    yield "  " + ", ".join(f"{part} {size / GB:.1f}" for part, size in estimate.parts.items() if size)


def _places(settings: Settings) -> Iterator[str]:
    save = settings.directories.save
    if save:
        resumes = "; goes on from what is there" if settings.directories.load == save else ""
        yield f"kept in: {save}, {_how_often(settings)}{resumes}"
    else:
        yield "kept in: nowhere (--save DIR --save-interval STEPS)"
    if settings.model.save_hf:
        yield f"Hugging Face model at the end: {settings.model.save_hf}"


def _how_often(settings: Settings) -> str:
    """When checkpoints are written, and which stay."""
    checkpoints, directories = settings.checkpoints, settings.directories
    minutes, newest, every = (
        checkpoints.save_every_minutes,
        checkpoints.keep_checkpoints,
        directories.save_retain_interval,
    )
    often = [f"every {minutes:g} minutes"] if minutes is not None else []
    if "save_interval" in settings.given:
        often.append(f"every {directories.save_interval} steps")
    kept = [f"the newest {newest or 1}"] if newest or every else []
    if every:
        kept.append(f"those of every {every} steps")
    return " and ".join(often) + (f", of which {' and '.join(kept)} stay" if kept else "")
