"""The directories of a run: that there is something to start from, and that what is kept can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.training.checkpointing import get_checkpoint_tracker_filename

from megatron_bdpo.errors import UserError
from megatron_bdpo.platform.installation import libraries
from megatron_bdpo.platform.versions import installed_versions
from megatron_bdpo.training.checkpoints import choose_intact_checkpoints
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero, say
from megatron_bdpo.training.flags import recipe
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.identity import checkpoint_directory, identity_in, refuse_other_adapters, stored_arguments
from megatron_bdpo.training.nodes import on_every_node, shared_by_every_node
from megatron_bdpo.training.settings import Settings

#: Of a checkpoint in torch's distributed format.
_METADATA = ".metadata"


def check_directories(settings: Settings, lora: Mapping[str, Any]) -> None:
    """Refuse a starting checkpoint that is not there or damaged, and a --save that cannot be written. Collective.

    Args:
        lora: the run's adapters; see ``RunIdentity.lora``.

    Raises:
        UserError: on every rank, naming the flag.
    """
    directories, is_run = settings.directories, not settings.dry_run.is_wanted
    load, pretrained = directories.load, directories.pretrained_checkpoint
    for flag, root in (("--load", load), ("--pretrained-checkpoint", pretrained)):
        tracker = get_checkpoint_tracker_filename(root) if root else ""
        if broadcast(Path(tracker).is_file()):
            on_every_node(flag, tracker, tracker)
    if settings.checkpoints.checkpoint_checksums and is_run:  # a dry run reads and changes no checkpoint
        choose_intact_checkpoints(directories)
    # The weights that adapters stand beside are read at every start.
    if pretrained and not any(map(checkpoint_directory, (pretrained,) if lora else (load, pretrained))):
        raise UserError(f"--pretrained-checkpoint {pretrained}: there is no checkpoint in it.")
    starts = {"--pretrained-checkpoint": (pretrained, {}), "--load": (load if directories.finetune else None, lora)}
    for flag, (root, adapters) in starts.items():
        directory = checkpoint_directory(root)
        with all_ranks_agree():
            # Megatron would read the same, but end in a traceback where it cannot.
            if directory and is_rank_zero() and is_run and (directory / _METADATA).is_file():
                stored = identity_in(stored_arguments(directory))
                refuse_other_adapters(stored.get("lora", {}), adapters, f"{flag} {directory}")
    if directories.save:
        _check_save(Path(directories.save))


def _check_save(save: Path) -> None:
    with all_ranks_agree():
        if is_rank_zero():
            try:
                save.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=save):
                    pass
            except OSError as error:
                raise UserError(f"--save {save} cannot be written: {error}") from error
    shared_by_every_node("--save", save)


def keep_recipe(arguments: Arguments) -> None:
    """Leave what this start was told in --save, as a recipe. Collective.

    Raises:
        UserError: on every rank, when it cannot be written.
    """
    settings = arguments.settings
    save = settings.directories.save
    with all_ranks_agree():
        if save and is_rank_zero():
            facts = {"ranks": settings.layout.ranks, "started in": Path.cwd(), **installed_versions(), **libraries()}
            try:
                say(f"recipe: {recipe.keep(Path(save), arguments.recipe, facts)}")
            except OSError as error:
                raise UserError(f"--save {save} cannot be written: {error}") from error
