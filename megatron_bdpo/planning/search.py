"""The layouts that a model has on a cluster, in the order of a rule of thumb, and why the others are out.

The rule estimates which share of the GPUs' time goes into the model's own arithmetic. It is no measurement:

    share = (1 - bubble) / (1 + recompute) * 0.96^log2(tp) * 0.96^log2(cp) * 0.98^log2(pp)

bubble = (pp - 1) / v / (M + (pp - 1) / v) for M microbatches and v virtual stages. Recomputing MLPs costs a fifth of a
step's arithmetic, recomputing all a third. The three factors stand for communication that is not hidden, for every
doubling of model parallelism; their figures are assumed. Tensor parallelism has to stay within a node. For each layout
the least recomputation that fits is taken; of those with the same share, in two digits, the one that needs less memory
comes first. Layouts that fill more than nine tenths of the memory come after all others: the estimate is not that good.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from megatron_bdpo.planning.activations import Recompute
from megatron_bdpo.planning.layout import Divisible, Layout
from megatron_bdpo.planning.memory import GB, JobShape, Memory, fullest
from megatron_bdpo.planning.model import ModelShape, Split

_KEPT_PER_DOUBLING = {"tensor": 0.96, "context": 0.96, "pipeline": 0.98}

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
    bubble: float
    share: float
    """By the rule above."""

    def __str__(self) -> str:
        split = self.job.split
        tensor, pipeline, context, expert = split.layout.sizes()
        sizes = {"TP": tensor, "PP": pipeline, "VP": split.chunks, "CP": context, "EP": expert}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
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
    return each.memory.total > _TIGHT * question.gpu_memory, -round(each.share, 2), each.memory.total


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
    yield from divisible(question.model, question.gpus).problems(layout)
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
    """Virtual stages: any number that divides a stage's layers."""
    per_stage = question.model.layers // layout.pipeline
    most = min(per_stage, _MOST_CHUNKS) if layout.pipeline > 1 else 1
    for chunks in range(1, most + 1):
        if per_stage % chunks == 0 and question.fixed.get("chunks", chunks) == chunks:
            yield replace(question.job.split, layout=layout, chunks=chunks)


def _least_recompute(question: Question, split: Split) -> Answer:
    """With the least recomputation that fits; with all layers recomputed if nothing does."""
    option = None
    for recompute, cost in _recomputations(question.model):
        option = _answer(question, split, recompute, cost)
        if option.memory.total <= question.gpu_memory:
            break
    assert option is not None
    return option


def _recomputations(model: ModelShape) -> list[tuple[Recompute, float]]:
    """Ways to recompute, and what each adds to a step's arithmetic, as a share of it."""
    modules = frozenset({"moe"} if model.experts else {"mlp"})
    return [
        (Recompute(), 0.0),
        (Recompute(granularity="selective", modules=modules), 1 / 5),
        (Recompute(granularity="full"), 1 / 3),
    ]


def _answer(question: Question, split: Split, recompute: Recompute, cost: float) -> Answer:
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
    waits = (pipeline - 1) / split.chunks
    bubble = waits / (microbatches + waits)
    kept = 1.0
    for name, size in (("tensor", tensor), ("context", context), ("pipeline", pipeline)):
        kept *= _KEPT_PER_DOUBLING[name] ** math.log2(size)
    return Answer(job, fullest(question.model, job), bubble, (1 - bubble) / (1 + cost) * kept)
