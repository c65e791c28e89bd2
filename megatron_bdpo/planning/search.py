"""The layouts that a model has on a cluster, the fastest by arithmetic first, and why the others are out.

How long a step takes is counted in ``planning.speed``; it is no measurement. Tensor parallelism has to stay within a
node. For each layout the least recomputation that fits is taken; of those whose steps take as long within a hundredth,
the one that needs less memory comes first. Layouts that fill more than nine tenths of the memory come after all others:
the estimate is not that good. The last stage has the log-probs beside its layers: where the layers and one more can be
divided, Megatron's --account-for-loss-in-pipeline-split is tried too, which leaves the last stage a layer less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from megatron_bdpo.planning.activations import Recompute
from megatron_bdpo.planning.layout import Divisible, Layout
from megatron_bdpo.planning.machine import Machine
from megatron_bdpo.planning.memory import GB, JobShape, Memory, fullest
from megatron_bdpo.planning.model import ModelShape, Split
from megatron_bdpo.planning.speed import StepTime, step_time

_MOST_CHUNKS = 8

_TIGHT = 0.9


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be laid out, and on what."""

    model: ModelShape
    gpus: int
    gpus_per_node: int
    gpu_memory: float
    """Bytes."""
    seq_length: int
    """Of a pack."""
    pairs_per_step: int
    tokens_per_pair: float
    job: JobShape
    """Precision, reference, log-probs: what does not depend on the layout."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """tensor, pipeline, context, expert, chunks: only layouts with these."""


@dataclass(frozen=True)
class Answer:
    """One layout."""

    job: JobShape
    memory: Memory
    time: StepTime

    def __str__(self) -> str:
        split = self.job.split
        tensor, pipeline, context, expert = split.layout.sizes()
        sizes = {"TP": tensor, "PP": pipeline, "VP": split.chunks, "CP": context, "EP": expert}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        words += ["loss"] * split.loss_as_layer
        return " ".join([*words, f"DP{self.job.data_parallel}"])


@dataclass(frozen=True)
class Refused:
    """A layout that is out."""

    layout: Layout
    reason: str
    needs: float = math.inf
    """Bytes, where memory is what it lacks."""


def answer(question: Question) -> tuple[list[Answer], list[Refused]]:
    """Feasible layouts, the best one by the rule first, and the others."""
    answers: list[Answer] = []
    refused: list[Refused] = []
    for layout in _layouts(question):
        reason = next(_problems(question, layout), None)
        if reason:
            refused.append(Refused(layout, reason))
            continue
        options = [_least_recompute(question, split) for split in _splits(question, layout)]
        fitting = [option for option in options if option.memory.total <= question.gpu_memory]
        if fitting:
            answers.append(min(fitting, key=lambda each: _order(question, each)))
        elif options:
            needs = min(option.memory.total for option in options)
            refused.append(Refused(layout, f"needs {needs / GB:.0f} GB, also with all layers recomputed", needs))
    answers.sort(key=lambda each: _order(question, each))
    refused.sort(key=lambda each: (each.needs, each.layout.sizes()))
    return answers, refused


def _order(question: Question, each: Answer) -> tuple[bool, float, float]:
    return each.memory.total > _TIGHT * question.gpu_memory, round(math.log(each.time.seconds), 2), each.memory.total


def _layouts(question: Question) -> Iterator[Layout]:
    sizes = [size for size in range(1, question.gpus + 1) if question.gpus % size == 0]
    stages = [size for size in sizes if size <= question.model.layers]
    experts = [size for size in sizes if size <= question.model.experts] or [1]
    for each in itertools.product(sizes, stages, [size for size in sizes if size <= 8], experts):
        layout = Layout(*each)
        names = ("tensor", "pipeline", "context", "expert")
        if all(question.fixed.get(name, size) == size for name, size in zip(names, each, strict=True)):
            yield layout


def _problems(question: Question, layout: Layout) -> Iterator[str]:
    layers = question.model.layers
    if layers % layout.pipeline and not (layers + 1) % layout.pipeline:  # with the loss as one of them
        layers += 1
    shape = divisible(question.model, question.gpus)
    yield from replace(shape, layers=layers, shares_groups=not question.job.adapters).problems(layout)
    tensor, pipeline, context, _ = layout.sizes()
    if question.gpus_per_node % tensor:
        yield f"tensor parallelism over {tensor} GPUs would leave the node of {question.gpus_per_node}"
    shares = 8 * tensor * context
    if question.seq_length % shares:
        yield f"packs of {question.seq_length} positions are no multiple of {shares} (8 x TP x CP)"
    replicas = question.gpus // (tensor * pipeline * context)
    if question.pairs_per_step < replicas:
        yield f"{question.pairs_per_step} pairs a step are fewer than {replicas} data-parallel ranks"


def divisible(model: ModelShape, ranks: int) -> Divisible:
    """What of a model a layout has to divide."""
    return Divisible(
        ranks=ranks,
        layers=model.layers,
        layers_per_chunk=0,
        heads=model.heads,
        groups=model.groups,
        ffn=0 if model.experts else model.ffn,
        experts=model.experts,
        expert_ffn=model.expert_ffn,
        expert_tensor=0,
    )


def _splits(question: Question, layout: Layout) -> Iterator[Split]:
    """Virtual stages: any number that divides a stage's layers, which may have the loss among them."""
    for loss_as_layer in (False, True)[: 2 if layout.pipeline > 1 else 1]:
        per_stage, rest = divmod(question.model.layers + loss_as_layer, layout.pipeline)
        most = min(per_stage, _MOST_CHUNKS) if layout.pipeline > 1 else 1
        for chunks in range(1, most + 1):
            if not rest and per_stage % chunks == 0 and question.fixed.get("chunks", chunks) == chunks:
                yield replace(question.job.split, layout=layout, chunks=chunks, loss_as_layer=loss_as_layer)


def _least_recompute(question: Question, split: Split) -> Answer:
    """With the least recomputation that fits; with all layers recomputed if nothing does."""
    option = None
    for recompute in _recomputations(question.model):
        option = _answer(question, split, recompute)
        if option.memory.total <= question.gpu_memory:
            break
    assert option is not None
    return option


def _recomputations(model: ModelShape) -> list[Recompute]:
    """Ways to recompute, from none to all."""
    modules = frozenset("moe" if model.has_experts(layer) else "mlp" for layer in range(model.layers))
    return [Recompute(), Recompute(granularity="selective", modules=modules), Recompute(granularity="full")]


def _answer(question: Question, split: Split, recompute: Recompute) -> Answer:
    tensor, pipeline, context, _ = split.layout.sizes()
    replicas = question.gpus // (tensor * pipeline * context)
    # The step plan makes packs shorter where the replicas cannot share them evenly; memory is of the longest.
    packs = math.ceil(question.pairs_per_step * question.tokens_per_pair / question.seq_length)
    multiple = pipeline if split.chunks > 1 else 1
    microbatches = math.ceil(packs / replicas / multiple) * multiple
    job = replace(
        question.job,
        ranks=question.gpus,
        split=split,
        pack_length=question.seq_length,
        microbatches=microbatches,
        recompute=recompute,
        sequence_parallel=tensor > 1,
    )
    tokens = question.pairs_per_step * question.tokens_per_pair
    machine = Machine(gpus_per_node=question.gpus_per_node)
    # A query sees half of its pair at most: what comes before it, and nothing of the other answer.
    time = step_time(question.model, job, machine, tokens, keys=question.tokens_per_pair / 2)
    return Answer(job, fullest(question.model, job), time)
