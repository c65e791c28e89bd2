"""Our whole job in this process, timed step by step through the run's own hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.gauges import Instant, PeakMemory


@dataclass
class Measured:
    """What a job took.

    Attributes:
        marks: before the first step, and after each.
        losses: of each step; NaN where it was skipped, as fp16 does until its loss scale is low enough.
        lengths: [steps, pairs, 3] tokens of prompt, chosen and rejected, as the steps have them.
        pairs: [steps][pairs] their tokens, in that order; only where they were asked for.
        positions: positions of all packs of a step on average, padding included.
        fill: the share of them that holds a token.
        peak: memory above what the imports take, in bytes.
        reference: from the loaded policy until all its pairs were scored as the reference.
        step_zero: how far the first step is from policy == reference, as ``step_zero.Deviation``; empty: not looked.
    """

    marks: list[Instant] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lengths: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((0, 0, 3), np.int64))
    pairs: list[list[tuple[Any, Any, Any]]] = field(default_factory=list)
    positions: float = 0.0
    fill: float = 0.0
    peak: float = 0.0
    reference: float = 0.0
    step_zero: dict[str, float] = field(default_factory=dict)

    def figures(self, warm_up: int) -> dict[str, float]:
        """Of the steps after ``warm_up``: seconds, rates, tokens as without sharing and padding."""
        first, last = self.marks[warm_up], self.marks[-1]
        lengths = self.lengths[warm_up:]
        return {
            **rates(first, last, lengths),
            "fill": self.fill,
            "peak": self.peak,
            "reference_seconds": self.reference,
        }


def rates(first: Instant, last: Instant, lengths: np.ndarray[Any, Any]) -> dict[str, float]:
    """Of the steps between two instants; ``lengths`` as :class:`Measured` has them."""
    wall, processor = last.wall - first.wall, last.processor - first.processor
    pairs = lengths.shape[0] * lengths.shape[1]
    return {
        "steps": lengths.shape[0],
        "step_seconds": wall / lengths.shape[0],
        "step_processor_seconds": processor / lengths.shape[0],
        "pairs_per_second": pairs / wall,
        "pairs_per_processor_second": pairs / processor,
        "tokens_per_second": float((lengths.sum() + lengths[..., 0].sum()) / wall),
    }


def flags(
    model: Path | str,
    data: Path | str,
    work: Path | str,
    *,
    pairs_per_step: int,
    steps: int,
    dtype: str,
    pack: int,
    max_prompt_length: int,
    loss: Sequence[str] = ("dpo", "--beta", "0.1"),
) -> list[str]:
    """A job over as many pairs as its steps have; optimizer settings as TRL is given them."""
    return [
        *("--hf-model", str(model), "--pair-data", str(data), "--pair-cache-dir", str(work)),
        *("--pairs-per-step", str(pairs_per_step), "--train-iters", str(steps)),
        *("--max-pairs", str(pairs_per_step * steps), "--seq-length", str(pack)),
        *("--max-prompt-length", str(max_prompt_length), "--long-pairs", "drop"),
        *("--preference-loss", *loss),
        *("--lr", str(LEARNING_RATE), "--lr-decay-style", "constant", "--weight-decay", str(WEIGHT_DECAY)),
        *("--adam-beta1", "0.9", "--adam-beta2", "0.999", "--adam-eps", "1e-8", "--clip-grad", str(CLIP)),
        *([f"--{dtype}"] if dtype != "fp32" else []),
    ]


LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-5, 0.01, 1.0


def run(
    argv: Sequence[str],
    device: str,
    *,
    keep_pairs: bool = False,
    judge: bool = True,
    after_step: Callable[[int], object] = lambda steps: None,
) -> Measured:
    """Run a job to its end.

    Args:
        keep_pairs: note the tokens of its pairs.
        judge: end at a first step that is too far from its reference.
        after_step: told the number of steps done.
    """
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.run import PreferenceRun

    arguments = Arguments.parse(argv)
    measured, memory = Measured(), PeakMemory(device)

    class Timed(PreferenceRun):
        def after_load(self, model: list[Any]) -> None:
            start = Instant.now()
            super().after_load(model)
            measured.reference = Instant.now().wall - start.wall

        def before_training(self, evaluate: Callable[[int], Any]) -> None:
            super().before_training(evaluate)
            measured.marks.append(Instant.now())

        def after_step(self, *step: Any) -> None:
            if self.step.gate is not None:
                measured.step_zero = asdict(self.step.gate.deviation())
                self.step.gate = self.step.gate if judge else None
            super().after_step(*step)
            measured.marks.append(Instant.now())
            after_step(len(measured.marks) - 1)

    with distributed.process_groups(arguments.settings.process):
        job = Timed(arguments)
        plan, pool = job.job.plan, job.job.pool
        measured.fill, measured.positions = plan.fill, plan.positions.sum() / len(plan.steps)
        pairs = [pool.grouping.pairs_of(step) for step in plan.steps]  # equally many in each
        measured.lengths = np.stack([pool.pairs.lengths[each] for each in pairs]).astype(np.int64)
        if keep_pairs:
            measured.pairs = [list(_tokens(pool, step)) for step in plan.steps]
        job.pretrain()
    measured.losses = [math.nan] * len(job.job.plan.steps)
    for step in job.progress.steps:
        measured.losses[int(step["iteration"]) - 1] = step["loss"]
    measured.peak = memory.read()
    return measured


def _tokens(pool: Any, ids: np.ndarray[Any, Any]) -> Iterator[tuple[Any, ...]]:
    for each in ids:
        group, _, compared = pool.group(each)
        for better, worse in compared:
            yield tuple(part.tolist() for part in (group.prompt, group.answers[better], group.answers[worse]))
