"""``megatron-bdpo plan``: which layouts a model has on a cluster, and what each needs of a GPU's memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from megatron_bdpo.cli import common
from megatron_bdpo.cli.common import POSITIVE, example, only_one
from megatron_bdpo.display import show
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.lora.lora_config import KINDS, parse_targets
from megatron_bdpo.planning import tables
from megatron_bdpo.planning.adapters import Adapters
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import GB, JobShape
from megatron_bdpo.planning.model import ModelShape, Split
from megatron_bdpo.planning.search import Question, answer
from megatron_bdpo.training.entry import prepare_platform

_FIXED = {
    "tensor": "--tensor-model-parallel-size",
    "pipeline": "--pipeline-model-parallel-size",
    "chunks": "--num-virtual-stages-per-pipeline-rank",
    "context": "--context-parallel-size",
    "expert": "--expert-model-parallel-size",
}

#: The search tries every way of dividing them.
_GPUS = click.IntRange(min=1, max=100_000)

_DEFAULTS = {"seq_length": 4096, "pairs_per_step": 128, "reference": "precomputed", "precision": "bf16"}


def _only_layouts_with(function: Any) -> Any:
    """An option for each part of a layout that the user may fix."""
    for name, flag in reversed(_FIXED.items()):
        function = click.option(flag, name, type=POSITIVE, metavar="N", help="Only layouts with this.")(function)
    return function


@click.command("plan", epilog=example("megatron-bdpo plan --hf-model MODEL --gpus 32 64 128 --seq-length 8192"))
@click.option("--hf-model", metavar="PATH_OR_NAME", help="A directory or hub name; config.json is enough.")
@click.option("--recipe", multiple=True, metavar="FILE", help="Model, packs, steps and precision of a recipe.")
@click.option("--gpus", type=_GPUS, multiple=True, required=True, metavar="N", help="Of the cluster.")
@click.argument("more_gpus", type=_GPUS, nargs=-1, metavar="[N]...")
@click.option("--gpus-per-node", type=POSITIVE, default=8, show_default=True, metavar="N")
@click.option("--gpu-memory", type=common.AMOUNT, default=80, show_default=True, metavar="GB", help="Of 10^9 bytes.")
@click.option("--seq-length", type=POSITIVE, metavar="N", help="Positions of a pack (4096, or the recipe's).")
@click.option("--pairs-per-step", type=POSITIVE, metavar="N", help="(128, or the recipe's)")
@click.option(
    "--tokens-per-pair",
    type=common.AMOUNT,
    default=1000,
    show_default=True,
    metavar="N",
    help="Prompt and both answers, on average.",
)
@click.option("--reference", type=click.Choice(["precomputed", "resident"]), help="(precomputed, or the recipe's)")
@click.option("--lora-rank", type=POSITIVE, metavar="R", help="With adapters of this rank (or the recipe's).")
@click.option("--lora-targets", metavar="NAMES", help="Projections with adapters, as --help of train has them.")
@click.option("--lora-type", type=click.Choice(KINDS), help="(lora, or the recipe's)")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32", "fp8"]), help="(bf16, or the recipe's)")
@_only_layouts_with
@click.option("--rows", type=POSITIVE, default=8, show_default=True, metavar="N", help="Layouts to show.")
@click.option("--json", "as_json", is_flag=True, help="All layouts, memory in bytes.")
@click.option("--markdown", is_flag=True, help="The layouts that fit, as a table.")
def plan(**options: Any) -> None:
    """List the layouts that fit a cluster, and their memory.

    The fastest first, with the memory of a GPU by part, and why the others are out. Arithmetic on assumed rates of an
    H100, no measurement; no GPU is needed, and no weights. Several numbers after --gpus are compared.
    """
    only_one(hf_model=options["hf_model"], recipe=options["recipe"])
    if options["as_json"] and options["markdown"]:
        raise click.UsageError("--json and --markdown are two forms of one output. Give one.")
    found = [(question, *answer(question)) for question in _questions(options)]
    if options["as_json"]:
        print(json.dumps([tables.to_json(*each) for each in found], indent=1))
    elif options["markdown"]:
        print(tables.markdown([(question, answers) for question, answers, _ in found], options["rows"]))
    else:
        for place, each in enumerate(found):
            show(*["", ""][: 2 * bool(place)], *tables.describe(*each, options["rows"]))
    for question, answers, _ in found:
        if not answers:
            raise UserError(
                f"no layout of this model fits {question.gpus} GPUs of {options['gpu_memory']:g} GB. Take more or "
                "larger GPUs, or a shorter --seq-length; what each layout lacks is listed above."
            )


def _questions(options: dict[str, Any]) -> list[Question]:
    if options["recipe"]:
        prepare_platform()
        from megatron_bdpo.training.job_memory import of_recipe  # imports Megatron

        model, told = of_recipe(options["recipe"])
    else:
        model, told = _of_hf_model(options["hf_model"]), {}
    chosen = {**_DEFAULTS, **told, **{name: options[name] for name in _DEFAULTS if options[name]}}
    adapters = _adapters(options, model, chosen.get("adapters"))
    job = JobShape(
        ranks=1,
        split=Split(layout=Layout(1, 1, 1)),
        pack_length=chosen["seq_length"],
        microbatches=1,
        precision=chosen["precision"],
        resident=chosen["reference"] == "resident" and not adapters,  # then it is the policy without them
        adapters=adapters,
    )
    return [
        Question(
            model=model,
            gpus=gpus,
            gpus_per_node=options["gpus_per_node"],
            gpu_memory=options["gpu_memory"] * GB,
            seq_length=chosen["seq_length"],
            pairs_per_step=chosen["pairs_per_step"],
            tokens_per_pair=options["tokens_per_pair"],
            job=job,
            fixed={name: options[name] for name in _FIXED if options[name]},
        )
        for gpus in (*options["gpus"], *options["more_gpus"])
    ]


def _adapters(options: dict[str, Any], model: ModelShape, recipes: Adapters | None) -> Adapters | None:
    rank, targets, kind = options["lora_rank"], options["lora_targets"], options["lora_type"]
    if not rank and not recipes:
        if targets or kind:
            raise click.UsageError("--lora-targets and --lora-type are of adapters. Add --lora-rank.")
        return None
    found = replace(recipes, rank=rank or recipes.rank) if recipes else Adapters(rank=rank)
    if targets:
        found = replace(found, targets=parse_targets(targets, gated=model.gated))
    return replace(found, dora=kind == "dora") if kind else found


def _of_hf_model(path_or_name: str) -> ModelShape:
    from megatron_bdpo.model.hf import checkpoint, config, directory  # imports torch

    model = directory.model_directory(path_or_name, weights=False)
    architecture = config.read_config(checkpoint.read_json(model / checkpoint.CONFIG))
    return ModelShape.from_arguments(architecture.arguments, architecture.weights.sizes.vocab)
