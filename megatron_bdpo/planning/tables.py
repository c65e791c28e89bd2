"""Answers as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_bdpo.planning.memory import GB, Memory
from megatron_bdpo.planning.search import Answer, Question, Refused

_TITLES = ("layout", "recompute", "microbatches", "bubble", "share", "state", "activations", "other", "GB")


def describe(question: Question, answers: Sequence[Answer], refused: Sequence[Refused], rows: int) -> str:
    """What a user wants to see, in a terminal."""
    lines = [_heading(question)]
    if not answers:
        lines.append("no layout fits; nearest:")
    else:
        lines += _aligned([_TITLES, *(_row(each) for each in answers[:rows])])
        if len(answers) > rows:
            lines.append(f"... and {len(answers) - rows} more (--rows)")
        lines += ["", f"memory of the best one, {answers[0]}, fullest stage:", memory_table(answers[0].memory)]
        lines += ["", "flags: " + flags(answers[0])]
    lines += ["", "out:", *_reasons(refused, rows)]
    lines.append("")
    lines.append("The order is a rule of thumb, memory is arithmetic, neither is measured: see docs/layouts.md.")
    return "\n".join(lines)


def markdown(found: Sequence[tuple[Question, Sequence[Answer]]], rows: int) -> str:
    """The feasible layouts as one table."""
    titles = ("GPUs", *_TITLES)
    table = [titles, ("--:", "---", "---", *("--:" for _ in _TITLES[2:]))]
    table += [(str(question.gpus), *_row(each)) for question, answers in found for each in answers[:rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def to_json(question: Question, answers: Sequence[Answer], refused: Sequence[Refused]) -> dict[str, Any]:
    """All of it, for ``json.dumps``; memory in bytes."""
    return {
        "gpus": question.gpus,
        "feasible": [
            {
                "layout": str(each),
                "flags": flags(each),
                "microbatches": each.job.microbatches,
                "bubble": each.bubble,
                "share": each.share,
                "recompute": str(each.job.recompute),
                "stage": each.memory.stage,
                "bytes": dict(each.memory.parts) | {"total": each.memory.total},
            }
            for each in answers
        ],
        "out": [{"layout": str(each.layout), "reason": each.reason} for each in refused],
    }


def memory_table(memory: Memory) -> str:
    """One line a part, in GB of 10^9 bytes."""
    lines = [f"  {part:<14}{size / GB:7.1f}" for part, size in memory.parts.items() if size]
    return "\n".join([*lines, f"  {'together':<14}{memory.total / GB:7.1f} GB"])


def flags(each: Answer) -> str:
    """Megatron's flags for an answer."""
    split, recompute = each.job.split, each.job.recompute
    words = [str(split.layout)] if max(split.layout.sizes()) > 1 else []
    if split.chunks > 1:
        words.append(f"--num-virtual-stages-per-pipeline-rank {split.chunks}")
    if each.job.sequence_parallel:
        words.append("--sequence-parallel")
    if each.job.distributed_optimizer:
        words.append("--use-distributed-optimizer")
    if recompute.granularity == "full":
        words.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif recompute.granularity:
        words.append(f"--recompute-granularity selective --recompute-modules {' '.join(sorted(recompute.modules))}")
    return " ".join(words)


def _heading(question: Question) -> str:
    job = question.job
    return (
        f"{question.gpus} GPUs of {question.gpu_memory / GB:g} GB, {question.gpus_per_node} a node; packs of "
        f"{question.seq_length}, {question.pairs_per_step} pairs a step of {question.tokens_per_pair:g} tokens; "
        f"{job.precision}, reference {'resident' if job.resident else 'precomputed'}"
    )


def _row(each: Answer) -> tuple[str, ...]:
    parts = each.memory.parts
    state = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    other = each.memory.total - state - parts["activations"]
    return (
        str(each),
        str(each.job.recompute),
        str(each.job.microbatches),
        f"{each.bubble:.0%}",
        f"{each.share:.2f}",
        *(f"{size / GB:.1f}" for size in (state, parts["activations"], other, each.memory.total)),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _reasons(refused: Sequence[Refused], rows: int) -> list[str]:
    """Those that lack memory, the nearest first; of the others how many there are for each kind of reason."""
    lines = [f"  {_short(each)}: {each.reason}" for each in refused if each.needs < float("inf")][:rows]
    others = [each for each in refused if each.needs == float("inf")]
    if others:
        lines.append(f"  and {len(others)} that the model or the job cannot be divided by, such as")
        lines += [f"  {_short(each)}: {each.reason}" for each in _different(others)[: max(3, rows // 2)]]
    return lines


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
