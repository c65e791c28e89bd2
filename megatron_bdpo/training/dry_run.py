"""``--dry-run``: everything that comes before the first weight, at the real number of ranks, by one process on a CPU.

This process plays rank 0 of a made-up world (Megatron's ``--fake-process-group``): flags, layout, data, plan and
Megatron's own set-up are the real ones. What it prints about time and memory is arithmetic, and says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron.training.theoretical_memory_usage import report_theoretical_memory
from megatron.training.training import num_floating_point_operations

from megatron_bdpo.display import Block, Facts
from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.machine import Machine
from megatron_bdpo.planning.memory import GB, fullest
from megatron_bdpo.planning.speed import step_time
from megatron_bdpo.platform.seams import initialize_megatron
from megatron_bdpo.training.disk import describe, needs
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.flags.validation import refusals_of_megatron, silence
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.job_memory import job_shape, model_shape
from megatron_bdpo.training.reporting.summary import memory, summarize
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.training.setup import RunSetup, forget_global_state, set_up

#: Dense bf16 of an H100 SXM, by NVIDIA's data sheet.
_TFLOPS = 989.0
#: Of that peak, doing model arithmetic: a usual figure for dense models of this size under Megatron.
_UTILISATION = 0.35

_MIB = 2**20


def make_up_ranks(arguments: Arguments) -> None:
    """Make this process rank 0 of as many as ``--dry-run`` says, by default of the launcher's.

    Raises:
        UserError: it is one of several processes already, or the ranks do not fill their nodes.
    """
    settings = arguments.settings
    if settings.process.rank or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError("--dry-run plays all ranks in one process. Start it with python, or one process of torchrun.")
    ranks, per_node = settings.dry_run.dry_run or settings.process.ranks, settings.dry_run.gpus_per_node
    if ranks < 1:
        raise UserError(f"--dry-run {ranks}: the number of ranks must be at least 1.")
    if per_node and (per_node < 1 or ranks % per_node):
        raise UserError(f"--dry-run {ranks}: these ranks do not fill nodes of --gpus-per-node {per_node}.")
    arguments.set(world_size=ranks, local_rank=0, fake_process_group=True)


def dry_run(arguments: Arguments) -> list[Block]:
    """Prepare the job as a run would, without weights, and report on it. Within ``process_groups``.

    Nothing is written but the tokenised pairs, in the cache where the run will find them.

    Raises:
        UserError: the job cannot run.
    """
    setup = set_up(arguments)
    arguments.set(tp_comm_overlap=False)  # its buffers are shared by real ranks
    try:
        with refusals_of_megatron(), silence():
            initialize_megatron()
        title, *lines = _report(setup)
        return [summarize(arguments, setup.job), title, Facts.of(line.removeprefix("  ") for line in lines)]
    finally:
        forget_global_state()


def _report(setup: RunSetup) -> list[str]:
    settings, job = setup.settings, setup.job
    lines = [f"dry run of {_cluster(settings)}", *_across_nodes(settings)]
    if setup.resumed:
        lines.append(f"  start: goes on from the checkpoint in {settings.directories.load}")
    work = Work.of(setup.arguments, job)
    lines += [*work.describe(settings), *_step(setup.arguments, job), *_memory(setup.arguments, job)]
    return [*lines, *(f"  {line}" for line in describe(needs(setup.arguments, job), job))]


def _step(arguments: Arguments, job: PairJob) -> list[str]:
    """A step of this plan by the arithmetic that layouts are compared by; it does not know a resident reference."""
    if job.resident:
        return []
    plan = job.plan
    steps = len(plan.steps)
    tokens = int(plan.real_tokens.sum()) / steps
    squares = float(job.pool.attention(share_prompts=job.share_prompts)[plan.steps].sum()) / steps
    settings = arguments.settings
    machine = Machine(gpus_per_node=settings.dry_run.gpus_per_node or 8)
    try:
        time = step_time(model_shape(arguments), job_shape(settings, job), machine, tokens, keys=squares / tokens / 2)
    except UserError:  # the summary says why
        return []
    return [
        f"  step on H100: {time.seconds:.2f} s, {time.tokens_per_gpu:,.0f} tokens/s/GPU, MFU {time.mfu:.0%}; by "
        "arithmetic (docs/layouts.md), not measured"
    ]


def _memory(arguments: Arguments, job: PairJob) -> list[str]:
    """Megatron's own report of memory, beside the summary's.

    Raises:
        UserError: the summary's is more than ``--gpu-memory``.
    """
    settings = arguments.settings
    try:
        estimate = fullest(model_shape(arguments), job_shape(settings, job))
    except UserError:  # the summary says why
        return []
    with silence():
        state, activations, _ = report_theoretical_memory(arguments.megatron, num_microbatches=job.plan.microbatches)
    line = (
        f"  memory by Megatron's report: weights, gradients and optimizer {state * _MIB / GB:.1f} GB, activations "
        f"{activations * _MIB / GB:.1f} GB{_as_reported(settings)}"
    )
    limit = settings.dry_run.gpu_memory
    if limit and estimate.total > limit * GB:
        parts = "\n".join(f"  {each}" for each in memory(arguments, job))
        raise UserError(f"this job does not fit --gpu-memory {limit:g} (GB):\n{parts}\n{line}")
    return [line]


def _cluster(settings: Settings) -> str:
    ranks, per_node = settings.layout.ranks, settings.dry_run.gpus_per_node
    return f"{ranks} ranks, {ranks // per_node} nodes of {per_node}" if per_node else f"{ranks} ranks"


def _across_nodes(settings: Settings) -> list[str]:
    tensor, per_node = settings.layout.tensor, settings.dry_run.gpus_per_node
    if per_node and per_node % tensor:
        return [f"  note: {tensor} tensor-parallel ranks cross nodes of {per_node}, and are slow there"]
    return []


def _as_reported(settings: Settings) -> str:
    """Which of its two formulas Megatron takes, and what it leaves out."""
    is_parallel = settings.layout.sequence_parallel and settings.memory.recompute_granularity == "selective"
    formula = "its formula for selective recomputation" if is_parallel else "its formula without sequence parallelism"
    without = ", and without context parallelism" if settings.layout.context > 1 else ""
    trained = ", and for training all weights: it knows no adapters" if settings.lora.is_wanted else ""
    return f" ({formula}{without}{trained})"


@dataclass(frozen=True)
class Work:
    """Arithmetic that a run does, by Megatron's own count: products of matrices, without recomputation.

    Beside adapters a third of it is left out, but for attention: the gradients of frozen weights. The adapters' own
    products are not counted.

    Attributes:
        tokens: positions that hold a token, over all steps; ``positions`` with the padding.
        training: floating-point operations of all steps.
        scoring: of scoring the reference, at most.
        idle: share of a step in which a pipeline stage waits for its first or after its last microbatch.
    """

    steps: int
    tokens: int
    positions: int
    training: float
    scoring: float
    idle: float

    @classmethod
    def of(cls, arguments: Arguments, job: PairJob) -> Work:
        """The work of a job, from arguments with its plan."""
        plan = job.plan
        positions = plan.positions.sum() / len(plan.steps)
        squares = float(job.pool.attention(share_prompts=job.share_prompts)[plan.steps].sum() / len(plan.steps))
        # Megatron's count knows no windows.
        keys = squares / float(plan.real_tokens.sum()) * len(plan.steps) / 2
        squares *= model_shape(arguments).attended_share(keys)
        whole = _operations(arguments, plan.packs_per_step, squares, positions)
        # Without squares of lengths there is no attention, whose backward pass has no weights.
        layers = _operations(arguments, plan.packs_per_step, 0.0, positions)
        step = whole - layers / 3 if arguments.settings.lora.is_wanted else whole
        needs = job.loss.requirements
        # A resident reference takes part in what the policy does to look at a step of answers.
        looks_too = job.resident and job.loss.spec.step_shift is not None
        passes = sum([needs.reference or needs.comprehension, needs.comprehension, needs.mismatched or looks_too])
        scored = len(job.train.ids) + len(job.held_out.ids)
        if job.resident:
            scored = len(plan.steps) * plan.steps.shape[1]
        # A forward pass is a third of all this; answers without their prompts are shorter than pairs.
        scoring = passes * scored / plan.steps.shape[1] * whole / 3
        if job.loss.spec.looks_at_steps:
            step += whole / 3
        steps = len(plan.steps)
        layout = arguments.settings.layout
        waits = (layout.pipeline - 1) / layout.chunks
        return cls(
            steps,
            int(plan.real_tokens.sum()),
            int(plan.positions.sum()),
            steps * step,
            scoring,
            waits / (waits + plan.microbatches),
        )

    def describe(self, settings: Settings) -> list[str]:
        """Tokens, and hours at the assumed rate."""
        peak, utilisation = settings.dry_run.gpu_tflops or _TFLOPS, settings.dry_run.assumed_mfu or _UTILISATION
        rate = settings.layout.ranks * peak * 1e12 * utilisation
        training, scoring = self.training / rate / (1 - self.idle), self.scoring / rate
        waiting = f", and stages wait {self.idle:.0%} of a step for its microbatches" if self.idle else ""
        work = (
            f"{self.training / 1e15:,.1f} PFLOP of training, at most {self.scoring / 1e15:,.1f} of scoring references"
        )
        time = f"{_duration(training)} of training, at most {_duration(scoring)} of scoring"
        without = ", the adapters' own products" if settings.lora.is_wanted else ""
        return [
            f"  steps: {self.steps:,}, with {self.tokens:,} tokens in {self.positions:,} positions",
            f"  arithmetic: {work}; recomputation{without} and evaluations not counted",
            f"  time: {time}. Assumed, not measured:",
            f"    a GPU does {utilisation:.0%} of {peak:g} TFLOP/s (--assumed-mfu, --gpu-tflops){waiting}",
        ]


def _operations(arguments: Arguments, packs: int, squares: float, positions: float) -> float:
    return float(num_floating_point_operations(arguments.megatron, packs, squares, positions))


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
