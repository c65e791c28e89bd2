"""The policy as a Hugging Face model: at the end of a run, and from a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model
from torch import Tensor, distributed

from megatron_bdpo.artifact import new_directory, partial_directory, write_whole
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.card import TrainingFacts, model_card
from megatron_bdpo.model.hf.checkpoint import CONFIG, INDEX, read_json
from megatron_bdpo.model.hf.classifier import classifier_config
from megatron_bdpo.model.hf.config import Architecture, differences, read_config, write_config
from megatron_bdpo.model.hf.export import (
    refuse_existing,
    split,
    write_companions,
    write_file,
    write_json,
)
from megatron_bdpo.model.hf.file_layout import ExportFile, Source, index, lay_out, rounds
from megatron_bdpo.model.hf.gather import LiveWeights
from megatron_bdpo.model.hf.stored import StoredWeights
from megatron_bdpo.model.hf.tensors import WeightMap
from megatron_bdpo.model.lora.attach import merge
from megatron_bdpo.model.lora.lora_config import LoraConfig
from megatron_bdpo.training import identity
from megatron_bdpo.training.checkpoints import refuse_damaged
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, gather, host_group, is_rank_zero, say
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.flags.recipe import Value, kept, to_yaml
from megatron_bdpo.training.hf.adapter_files import export_adapters, save_adapters
from megatron_bdpo.training.hf.packing import pack
from megatron_bdpo.training.megatron_settings import DirectorySettings
from megatron_bdpo.training.settings import Settings
from megatron_bdpo.user_files import read_regular

#: What a reader of the model card wants to know of a run's arguments.
_SETTINGS = (
    "hf_revision",
    "pairs_per_step", "train_iters", "seq_length", "max_prompt_length", "max_response_length", "lr", "min_lr",
    "lr_decay_style", "lr_warmup_iters", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "params_dtype",
    "share_prompts", "reference", "lora_dropout", "seed",
    "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "data_parallel_size",
)  # fmt: skip


#: In --save: which exports are this run's. Written before an export gets its name.
_RECORDS = {"save_hf": "export.json", "save_hf_merged": "export_merged.json"}


def export_places(settings: Settings) -> dict[str, Path]:
    """Where a run writes at its end: setting -> directory."""
    named = {"save_hf": settings.model.save_hf, "save_hf_merged": settings.lora.save_hf_merged}
    return {name: Path(target) for name, target in named.items() if target}


def check_save_hf(settings: Settings, last_step: int | None = None) -> None:
    """Refuse what would fail after the training run: called before it. Collective.

    What this run has written itself is no obstacle: its end may have been killed, or it is started once more.

    Args:
        last_step: of the training run, once it is known.
    """
    places = export_places(settings)
    for name, target in places.items():
        with all_ranks_agree():
            if not settings.model.hf_model:
                raise UserError(
                    f"--{name.replace('_', '-')} writes the configuration of --hf-model, which is not given. Export "
                    "from a checkpoint instead: megatron-bdpo convert export."
                )
            if len(places) > len({place.absolute() for place in places.values()}):
                raise UserError(f"--save-hf and --save-hf-merged both name {target}. Give two directories.")
            if is_rank_zero() and not _is_own_export(settings.directories, name, target, last_step):
                refuse_existing(target)
        if last_step is None:
            _check_shared(target)


def _check_shared(target: Path) -> None:
    """Refuse a place that cannot be written, or that rank 0 has for itself. Collective."""
    mark = target.with_name(broadcast(f".{target.name}.{secrets.token_hex(4)}.seen"))
    with _each_writes(target):
        if is_rank_zero():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    try:
        with all_ranks_agree():
            if not mark.exists():
                raise UserError(f"--save-hf {target}: what rank {distributed.get_rank()} writes {_not_shared(target)}")
    finally:
        if is_rank_zero():
            mark.unlink()


def _is_own_export(directories: DirectorySettings, name: str, target: Path, last_step: int | None) -> bool:
    """Whether the run that is resumed has written what is at ``target``, after its step ``last_step``."""
    if not directories.save or not directories.goes_on_in_place:
        return False
    try:
        record = json.loads(read_regular(Path(directories.save) / _RECORDS[name]))
        return record["directory"] == _number(target) and last_step in (None, record["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _number(directory: Path) -> int:
    """What a directory keeps when it is renamed, and shares with no other one on its disk."""
    return directory.stat().st_ino


def save_live(
    arguments: Arguments,
    lora: LoraConfig | None,
    model: list[Any],
    metrics: Mapping[str, float],
    base: str,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Write the policy in ``model`` to ``--save-hf``, or its adapters, and the two together to ``--save-hf-merged``.

    Collective.

    Args:
        arguments: of a run that is done.
        lora: the adapters that were trained.
        model: the chunks, perhaps in DDP. Adapters are in the base's weights afterwards.
        metrics: of the last evaluation, where this rank has them.
        base: fingerprint of the weights that they stand beside.
        pause: called before each round of files, on all ranks; may raise to leave, and nothing is left then.
    """
    settings = arguments.settings
    directories, last_step = settings.directories, settings.schedule.train_iters
    original = Path(settings.model.hf_model or "")
    known = [each for each in gather(dict(metrics)) if each]
    done = {**vars(arguments.megatron), "iteration": last_step}  # Megatron leaves there where the run began
    facts = training_facts(done, known[0] if known else {}, arguments.recipe)
    for name, target in export_places(settings).items():
        keep_record = functools.partial(_keep_record, directories, name, target, last_step)
        if broadcast(is_rank_zero() and _is_own_export(directories, name, target, last_step)):
            say(f"{target}: written before")
        elif lora and name == "save_hf":
            save_adapters(unwrap_model(model), target, settings, lora, base, facts, keep_record)
            say(f"adapters written to {target}")
        else:
            merge(model)
            source = LiveWeights(unwrap_model(model), host_group())
            config = read_json(original / CONFIG)
            is_reward = settings.objective.is_reward
            write_model(source, target, _described(config, is_reward=is_reward), original, facts, keep_record, pause)
            say(f"{'reward model' if is_reward else 'policy'} written to {target}")


def _described(config: Mapping[str, Any], *, is_reward: bool) -> Mapping[str, Any]:
    """The ``config.json`` of what a run has made of the model that this one describes."""
    return classifier_config(config, read_config(config, reward_models=True).family) if is_reward else config


def _keep_record(directories: DirectorySettings, name: str, target: Path, step: int | None, directory: Path) -> None:
    """Note in --save that the export in ``directory``, soon to be called ``target``, is this run's."""
    if directories.save:
        record = {"step": step, "directory": _number(directory), "name": str(target)}
        write_whole(Path(directories.save) / _RECORDS[name], json.dumps(record) + "\n")


def write_model(
    source: Source,
    target: Path,
    config: Mapping[str, Any],
    original: Path | None,
    facts: TrainingFacts,
    before_naming: Callable[[Path], None] = lambda directory: None,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Write a Hugging Face model: its files by all ranks that have a share of the weights. Collective.

    Args:
        before_naming: called on rank 0 with the finished directory before it is renamed to ``target``.
        pause: called before each round of files, on all ranks; what it raises ends the export, and nothing is left.

    Raises:
        UserError: on every rank: ``target`` is there already or cannot be written, or tensors are missing. Nothing is
            left at ``target`` then.
    """
    architecture = read_config(config, reward_models=True)
    weights = architecture.weights
    files = lay_out(source.wholes, weights)
    with contextlib.ExitStack() as until_named:
        with _each_writes(target):
            if is_rank_zero():
                refuse_existing(target)
                until_named.enter_context(new_directory(target))
        for together in rounds(files):
            pause()
            _write_round(source, together, target, weights)
        with _each_writes(target):
            if is_rank_zero():
                _refuse_missing(files, target)
                if len(files) > 1:
                    write_json(partial_directory(target) / INDEX, index(files, weights))
        pack(architecture, partial_directory(target), functools.partial(_each_writes, target))
        with _each_writes(target):
            if is_rank_zero():
                directory = partial_directory(target)
                described = {key: value for key, value in config.items() if key != "quantization_config"}
                write_companions(directory, described, files[0].wholes[0].dtype, original, model_card(facts))
                before_naming(directory)
                until_named.close()


def _write_round(source: Source, files: Sequence[ExportFile], target: Path, weights: WeightMap) -> None:
    """One file of every rank that has one: first all of them exchange their tensors, then all write. Collective."""
    tensors: dict[str, Tensor] = {}
    for place, whole in source.together(files):
        tensors |= split(place, whole, weights)
    with _each_writes(target):
        for file in files:
            if file.writer == distributed.get_rank():
                write_file(partial_directory(target) / file.name, tensors)


@contextlib.contextmanager
def _each_writes(target: Path) -> Iterator[None]:
    """What the operating system refuses on one rank ends all of them. Collective."""
    with all_ranks_agree():
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the Hugging Face model cannot be written to {target} (rank {distributed.get_rank()}): {error}. Make "
                "room there or name another directory; megatron-bdpo convert export writes one from a checkpoint."
            ) from error


def _refuse_missing(files: Sequence[ExportFile], target: Path) -> None:
    """What other ranks have written has to be where rank 0 names it."""
    for file in files:
        if not (partial_directory(target) / file.name).is_file():
            raise UserError(f"{file.name}, which rank {file.writer} has written, {_not_shared(target)}")


def _not_shared(target: Path) -> str:
    return (
        f"is not in the {target.parent.absolute()} of rank 0, and each rank writes a part of the model. Name a "
        "directory on a file system that all nodes share."
    )


def export_checkpoint(
    checkpoint: Path, target: Path, config: Mapping[str, Any], original: Path | None, *, compare_digests: bool = True
) -> None:
    """Write the policy of a torch_dist checkpoint. Needs the process group of this one process.

    Args:
        checkpoint: the directory of one iteration, or one that names its newest.
        compare_digests: with its manifest, where it has one; this reads all of its files, the optimizer's too.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another architecture than ``config``.
    """
    refuse_existing(target)
    directory = identity.checkpoint_directory(str(checkpoint)) or checkpoint
    if compare_digests:
        refuse_damaged(directory)
    arguments, facts = identity.stored_arguments(directory), stored_facts(directory)
    config = _described(config, is_reward=identity.identity_in(arguments).get("objective") == "reward")
    architecture = read_config(config, reward_models=True)
    check_architecture(architecture, arguments, directory)
    if identity.identity_in(arguments).get("lora"):
        if original is None:
            raise UserError("the checkpoint holds adapters, which stand beside a model: give --hf-model.")
        return export_adapters(directory, target, str(original), arguments, model_card(facts, library="peft"))
    source = StoredWeights(directory, architecture.weights)
    write_model(source, target, config, original, facts)


def config_of(checkpoint: Path, family: str) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint's model, from the arguments that it was trained with."""
    directory = identity.checkpoint_directory(str(checkpoint)) or checkpoint
    arguments = identity.stored_arguments(directory)
    if "scored_vocab_size" not in arguments:
        raise UserError(f"the checkpoint {directory} was not written by a preference run. Give --hf-model.")
    return write_config(family, arguments, arguments["scored_vocab_size"])


def check_architecture(architecture: Architecture, arguments: Mapping[str, Any], directory: Path) -> None:
    """Refuse to describe weights by another model's configuration."""
    differing = differences(architecture.arguments, arguments)
    if differing:
        raise UserError(f"the checkpoint {directory} is of another architecture: {'; '.join(differing)}.")


def stored_facts(checkpoint: Path) -> TrainingFacts:
    """What a checkpoint, and the recipe beside it, say about its run.

    Args:
        checkpoint: the directory of one iteration.
    """
    state = identity.stored_state(checkpoint)
    done = {**vars(state["args"]), "iteration": state.get("iteration")}  # the arguments' is where the run began
    return training_facts(done, {}, kept(checkpoint.parent) or {})


def training_facts(
    arguments: Mapping[str, Any], metrics: Mapping[str, float], given: Mapping[str, Value]
) -> TrainingFacts:
    """What a run's arguments, its identity among them, say about it.

    Args:
        given: what the user has said, as a recipe has it.
    """
    run = identity.identity_in(arguments)
    return TrainingFacts(
        base_model=str(
            next(filter(None, map(arguments.get, ("hf_model", "pretrained_checkpoint", "base_checkpoint"))), "")
        ),
        loss=", ".join([run.get("loss", ""), *(f"{name} {value}" for name, value in run.get("settled", {}).items())]),
        data={
            "pairs": " ".join(map(str, arguments.get("pair_data") or ())),
            "held out": " ".join(map(str, arguments.get("eval_pair_data") or ())) or "none, or a share of the pairs",
            "trained on": run.get("pairs"),
            "fingerprint": run.get("data"),
        },
        settings={
            "steps done": arguments.get("iteration"),
            **{f"adapters' {name}": value for name, value in run.get("lora", {}).items()},
            **{name: arguments[name] for name in _SETTINGS if arguments.get(name) is not None},
        },
        metrics=metrics,
        flags=to_yaml(given) if given else "",
    )
