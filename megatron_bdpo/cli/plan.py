"""``megatron-bdpo plan``: which layouts a model has on a cluster, and what each needs of a GPU's memory."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning import tables
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import GB, JobShape
from megatron_bdpo.planning.model import ModelShape, Split
from megatron_bdpo.planning.search import Question, answer

_FIXED = {
    "tensor": "--tensor-model-parallel-size",
    "pipeline": "--pipeline-model-parallel-size",
    "chunks": "--num-virtual-stages-per-pipeline-rank",
    "context": "--context-parallel-size",
    "expert": "--expert-model-parallel-size",
}

_DEFAULTS = {"seq_length": 4096, "pairs_per_step": 128, "reference": "precomputed", "precision": "bf16"}


def add_parser(subcommands: Any) -> None:
    """Add ``plan``."""
    parser = subcommands.add_parser(
        "plan",
        help="layouts for a model on a cluster, and the memory they need",
        description="Layouts that fit, in the order of a rule of thumb, with the memory of a GPU by part, and why the "
        "others are out. Arithmetic, no measurement; no GPU is needed, and no weights.",
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--hf-model", metavar="PATH_OR_NAME", help="a directory or hub name; config.json is enough")
    origin.add_argument(
        "--recipe", action="append", metavar="FILE", help="model, packs, steps and precision of a recipe"
    )
    add = parser.add_argument
    add(
        "--gpus", type=_positive, nargs="+", required=True, metavar="N", help="of the cluster; several for a comparison"
    )
    add("--gpus-per-node", type=_positive, default=8)
    add("--gpu-memory", type=float, default=80, metavar="GB", help="of 10^9 bytes (80)")
    add("--seq-length", type=_positive, help="positions of a pack (4096, or the recipe's)")
    add("--pairs-per-step", type=_positive, help="(128, or the recipe's)")
    add("--tokens-per-pair", type=float, default=1000, help="prompt and both answers, on average (1000)")
    add("--reference", choices=("precomputed", "resident"), help="(precomputed, or the recipe's)")
    add("--precision", choices=("bf16", "fp16", "fp32", "fp8"), help="(bf16, or the recipe's)")
    fixed = parser.add_argument_group("only layouts with these")
    for name, flag in _FIXED.items():
        fixed.add_argument(flag, dest=name, type=_positive, metavar="N")
    add("--rows", type=_positive, default=8, help="layouts to show (8)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="all layouts, memory in bytes")
    output.add_argument("--markdown", action="store_true", help="the layouts that fit, as a table")
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _run(options: argparse.Namespace) -> None:
    questions = _questions(options)
    found = [(question, *answer(question)) for question in questions]
    if options.json:
        print(json.dumps([tables.to_json(*each) for each in found], indent=1))
    elif options.markdown:
        print(tables.markdown([(question, answers) for question, answers, _ in found], options.rows))
    else:
        print("\n\n".join(tables.describe(*each, options.rows) for each in found))
    for question, answers, _ in found:
        if not answers:
            raise UserError(f"no layout of this model fits {question.gpus} GPUs of {options.gpu_memory:g} GB.")


def _questions(options: argparse.Namespace) -> list[Question]:
    if options.recipe:
        from megatron_bdpo.training.memory import of_recipe

        model, told = of_recipe(options.recipe)
    else:
        model, told = _of_hf_model(options.hf_model), {}
    chosen = {**_DEFAULTS, **told, **{name: getattr(options, name) for name in _DEFAULTS if getattr(options, name)}}
    job = JobShape(
        ranks=1,
        split=Split(layout=Layout(1, 1, 1)),
        pack_length=chosen["seq_length"],
        microbatches=1,
        precision=chosen["precision"],
        resident=chosen["reference"] == "resident",
    )
    return [
        Question(
            model=model,
            gpus=gpus,
            gpus_per_node=options.gpus_per_node,
            gpu_memory=options.gpu_memory * GB,
            seq_length=chosen["seq_length"],
            pairs_per_step=chosen["pairs_per_step"],
            tokens_per_pair=options.tokens_per_pair,
            job=job,
            fixed={name: getattr(options, name) for name in _FIXED if getattr(options, name)},
        )
        for gpus in options.gpus
    ]


def _of_hf_model(path_or_name: str) -> ModelShape:
    from megatron_bdpo.model.hf.checkpoint import CONFIG, read_json
    from megatron_bdpo.model.hf.config import read_config
    from megatron_bdpo.model.hf.hub import model_directory

    architecture = read_config(read_json(model_directory(path_or_name, weights=False) / CONFIG))
    return ModelShape.from_arguments(architecture.arguments, architecture.weights.sizes.vocab)
