"""``--help`` of a training run: its flags by task, a line each, the rest by name; ``--help-all`` has all of each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from megatron_bdpo.training.flags.flag_table import Flag, FlagTable

OWN = " (megatron_bdpo)"
_WIDTH, _INDENT = 100, 38

#: Task -> the titles of our groups, and Megatron's arguments, that it needs.
_TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "the model": (("policy",), ("pretrained_checkpoint", "tokenizer_type", "tokenizer_model")),
    "the pairs": (("preference pairs",), ()),
    "the loss": (("recipes and losses", "objective"), ()),
    "steps": (
        ("steps and packs",),
        ("seq_length", "train_iters", "lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "clip_grad",
         "weight_decay", "optimizer", "seed"),
    ),
    "the reference": (("reference", "log-probs"), ()),
    "adapters": (("LoRA",), ()),
    "layout": (
        (),
        ("tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "context_parallel_size",
         "expert_model_parallel_size", "use_distributed_optimizer"),
    ),
    "precision and memory": (
        (),
        ("bf16", "fp16", "fp8", "recompute_granularity", "recompute_method", "recompute_num_layers"),
    ),
    "checkpoints": (("checkpoints",), ("save", "load", "save_interval", "finetune")),
    "evaluation and output": (
        ("evaluation", "output", "watch"),
        ("eval_interval", "log_interval", "tensorboard_dir", "wandb_project", "wandb_exp_name"),
    ),
    "before it runs": (("dry run",), ()),
}  # fmt: skip

#: Of every loss; what is one loss's own, `megatron-bdpo losses NAME` tells.
_OF_ALL_LOSSES = ("beta", "nll_weight")
_LOSS_OPTIONS = "options of the preference losses"


def by_task(table: FlagTable) -> str:
    """The flags that most jobs need, a line each."""
    known, lines = table.flags(), []
    for task, (titles, names) in _TASKS.items():
        flags = [flag for title in titles for flag in table.groups[title + OWN]]
        if task == "the loss":
            flags += [flag for flag in table.groups[_LOSS_OPTIONS + OWN] if flag.dest in _OF_ALL_LOSSES]
        lines += [f"{task}:", *(_line(flag) for flag in [*flags, *(known[name] for name in names)])]
    lines += ["", "options of one loss: megatron-bdpo losses NAME", "all flags, Megatron's too: --help-all"]
    return "\n".join(lines)


def in_full(table: FlagTable) -> str:
    """Every flag with the whole of its help; ours first."""
    titles = sorted(table.groups, key=lambda title: not title.endswith(OWN))
    return "\n".join(line for title in titles for line in _group(title, table.groups[title]))


def _group(title: str, flags: list[Flag]) -> Iterator[str]:
    yield f"{title}:"
    for flag in flags:
        yield from _paragraph(", ".join([flag.usage, *flag.all_names[1:]]), flag.help)
    yield ""


def _line(flag: Flag) -> str:
    left = f"  --[no-]{flag.names[0][2:]}" if flag.kind == "switch" else f"  {flag.usage}"
    if len(left) >= _INDENT and flag.choices:
        left = f"  {flag.names[0]} {flag.dest.upper().rsplit('_', 1)[-1]}"
    room = _WIDTH - max(_INDENT, len(left) + 2)
    return f"{left:<{_INDENT - 2}}  {textwrap.shorten(flag.help, room, placeholder=' ...')}".rstrip()


def _paragraph(left: str, text: str) -> Iterator[str]:
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT) or [""]
    head = f"  {left}"
    if len(head) >= _INDENT - 1:
        yield head
        head = ""
    for line in wrapped:
        yield f"{head:<{_INDENT}}{line}".rstrip()
        head = ""
