"""Answers as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_bdpo.display import Block, Facts, Table
from megatron_bdpo.planning.memory import GB
from megatron_bdpo.planning.search import Answer, Question, Refused

_TITLES = (
    "layout", "recompute", "microbatches", "waits", "s/step", "tokens/s/GPU", "MFU", "state", "activations", "GB",
)  # fmt: skip
#: So that the table fits 80 columns: without the parts of memory.
_NARROW_TITLES = ("layout", "recompute", "batches", "waits", "s/step", "tok/s", "MFU", "GB")


def describe(question: Question, answers: Sequence[Answer], refused: Sequence[Refused], rows: int) -> list[Block]:
    """What a user wants to see, in a terminal."""
    blocks: list[Block] = [_heading(question)]
    if not answers:
        blocks.append("no layout fits; nearest:")
    else:
        table = [(*_row(each)[:7], _row(each)[-1]) for each in answers[:rows]]
        blocks.append(Table(_NARROW_TITLES, table, left=(0, 1), whole=(0, 1)))
        if len(answers) > rows:
            blocks.append(f"... and {len(answers) - rows} more (--rows)")
        blocks += ["", *_best(answers[0])]
    blocks += ["", "out:", Facts(_reasons(refused, rows)), ""]
    blocks.append(
        "Seconds, tokens/s of a GPU (tok/s), MFU and memory are arithmetic on assumed rates, none of it measured: see "
        "docs/layouts.md."
    )
    return blocks


def _best(answer: Answer) -> list[Block]:
    memory = answer.memory
    parts = [[part, f"{size / GB:.1f}"] for part, size in memory.parts.items() if size]
    step = [[part, f"{1000 * seconds:.0f}"] for part, seconds in answer.time.parts.items() if round(1000 * seconds)]
    step_title = f"a step of the best one, {answer}, slowest stage, in ms, by arithmetic"
    title = f"memory of the best one, {answer}, fullest stage, in GB"
    return [
        Table(["", ""], [*step, ["together", f"{1000 * answer.time.seconds:.0f}"]], title=step_title),
        "",
        Table(["", ""], [*parts, ["together", f"{memory.total / GB:.1f}"]], title=title),
        "",
        Facts([("flags", flags(answer))], indent=0),
    ]


def markdown(found: Sequence[tuple[Question, Sequence[Answer]]], rows: int) -> str:
    """The feasible layouts as one table."""
    titles = ("GPUs", *_TITLES)
    table = [titles, ("--:", "---", "---", *("--:" for _ in _TITLES[2:]))]
    table += [(str(question.gpus), *_row(each)) for question, answers in found for each in answers[:rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def to_json(question: Question, answers: Sequence[Answer], refused: Sequence[Refused]) -> dict[str, Any]:
    """All of it, for ``json.dumps``; memory in bytes, time in seconds of a step, both by arithmetic."""
    return {
        "gpus": question.gpus,
        "feasible": [
            {
                "layout": str(each),
                "flags": flags(each),
                "microbatches": each.job.microbatches,
                "seconds_per_step": each.time.seconds,
                "tokens_per_second_per_gpu": each.time.tokens_per_gpu,
                "mfu": each.time.mfu,
                "seconds": dict(each.time.parts),
                "recompute": str(each.job.recompute),
                "stage": each.memory.stage,
                "bytes": dict(each.memory.parts) | {"total": each.memory.total},
            }
            for each in answers
        ],
        "out": [{"layout": str(each.layout), "reason": each.reason} for each in refused],
    }


def flags(each: Answer) -> str:
    """Megatron's flags for an answer."""
    split, recompute = each.job.split, each.job.recompute
    words = [str(split.layout)] if max(split.layout.sizes()) > 1 else []
    if split.chunks > 1:
        words.append(f"--num-virtual-stages-per-pipeline-rank {split.chunks}")
    if each.job.sequence_parallel:
        words.append("--sequence-parallel")
    if split.loss_as_layer:
        words.append("--account-for-loss-in-pipeline-split")
    if each.job.distributed_optimizer:
        words.append("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
    if recompute.granularity == "full":
        words.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif recompute.granularity:
        words.append(f"--recompute-granularity selective --recompute-modules {' '.join(sorted(recompute.modules))}")
    if each.job.adapters:
        words.append(each.job.adapters.flags())
    return " ".join(words)


def _heading(question: Question) -> str:
    job = question.job
    reference = "resident" if job.resident else "precomputed"
    trained = f"{job.adapters}, reference the model without it" if job.adapters else f"reference {reference}"
    return (
        f"{question.gpus} GPUs of {question.gpu_memory / GB:g} GB, {question.gpus_per_node} a node; packs of "
        f"{question.seq_length}, {question.pairs_per_step} pairs a step of {question.tokens_per_pair:g} tokens; "
        f"{job.precision}, {trained}"
    )


def _row(each: Answer) -> tuple[str, ...]:
    parts = each.memory.parts
    state = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    return (
        str(each),
        str(each.job.recompute),
        str(each.job.microbatches),
        f"{each.time.waiting:.0%}",
        f"{each.time.seconds:.2f}",
        f"{each.time.tokens_per_gpu:,.0f}",
        f"{each.time.mfu:.0%}",
        *(f"{size / GB:.1f}" for size in (state, parts["activations"], each.memory.total)),
    )


def _reasons(refused: Sequence[Refused], rows: int) -> list[tuple[str, str]]:
    """Those that lack memory, the nearest first; of the others how many there are for each kind of reason."""
    reasons = [(_short(each), each.reason) for each in refused if each.needs < float("inf")][:rows]
    others = [each for each in refused if each.needs == float("inf")]
    if others:
        reasons.append(("", f"and {len(others)} that the model or the job cannot be divided by, such as"))
        reasons += [(_short(each), each.reason) for each in _different(others)[: max(3, rows // 2)]]
    return reasons


def _different(refused: Sequence[Refused]) -> list[Refused]:
    """The first of each kind of reason, told by its words without the numbers."""
    kinds: dict[str, Refused] = {}
    for each in refused:
        kinds.setdefault(" ".join(word for word in each.reason.split() if word.isalpha()), each)
    return list(kinds.values())


def _short(each: Refused) -> str:
    names = ("TP", "PP", "CP", "EP")
    sizes = zip(names, each.layout.sizes(), strict=True)
    return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "DP alone"
