"""Whether a run can go on from a checkpoint: found out from what the checkpoint says, before anything is built.

- The model is the checkpoint's: fields that decide the shapes and the meaning of its weights are compared.
- The learning rate is the checkpoint's so far: a run of other length, decay or warm-up goes on where it would have had
  the same rate in every step that is done. A constant rate has, so has WSD before its decay; a cosine has not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.training.training import get_optimizer_param_scheduler

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.layer_options import LayerOptions
from megatron_bdpo.training.checkpoints import named_checkpoint
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.flags.recipe import Value, kept
from megatron_bdpo.training.flags.validation import refusals_of_megatron
from megatron_bdpo.training.identity import checkpoint_directory, stored_state

#: Megatron's arguments without which a checkpoint's weights have other shapes, or mean something else.
_MODEL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention", "num_query_groups",
    "kv_channels", "swiglu", "quick_geglu", "normalization", "position_embedding_type", "rotary_base",
    "rotary_percent", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights",
    "window_size", "window_attn_skip_freq", "softmax_type", "num_experts", "moe_ffn_hidden_size", "moe_router_topk",
    "moe_layer_freq", "moe_shared_expert_intermediate_size", "multi_latent_attention",
    *(field.name for field in fields(LayerOptions)),
)  # fmt: skip

#: An argument of ours: ``lr_warmup_fraction`` as the user has given it, where the checkpoint's is kept.
_AS_TOLD = "bdpo_lr_warmup_fraction"

_ONLY_WITH_GROUPS = "num_query_groups"
_ONLY_WITH_EXPERTS = ("moe_ffn_hidden_size", "moe_router_topk", "moe_layer_freq", "moe_shared_expert_intermediate_size")


def check_continuation(arguments: Arguments, *, trains: bool) -> None:
    """Refuse a checkpoint of another model, and one whose schedule this run cannot go on with. Collective.

    Args:
        arguments: validated by Megatron. A warm-up that is given as a share of the steps is made to last as long as the
            checkpoint's.
        trains: the schedule is of concern.

    Raises:
        UserError: on every rank.
    """
    directories = arguments.settings.directories
    is_resumed = bool(trains and directories.load and not directories.finetune)
    for flag, root in (("--load", directories.load), ("--pretrained-checkpoint", directories.pretrained_checkpoint)):
        directory = checkpoint_directory(root)
        stored: dict[str, Any] | None = None
        with all_ranks_agree():
            if directory and is_rank_zero():
                state = stored_state(directory)
                _refuse_another_model(vars(state["args"]), arguments, f"{flag} {root}")
                if flag == "--load" and is_resumed:
                    names = (
                        "lr_warmup_init", "lr_warmup_fraction", _AS_TOLD, "lr_wsd_decay_iters", "lr_wsd_decay_style",
                        "train_iters",
                    )  # fmt: skip
                    stored = dict(state.get("opt_param_scheduler") or {})
                    stored |= {name: getattr(state["args"], name, None) for name in names}
        stored = broadcast(stored)
        if stored and "num_steps" in stored:
            with all_ranks_agree():
                _keep_warm_up(arguments, stored)
                _refuse_another_schedule(arguments, stored, str(root))


# The model -----------------------------------------------------------------------------------------------------------


def _refuse_another_model(there: Mapping[str, Any], arguments: Arguments, place: str) -> None:
    differing = different_fields(there, vars(arguments.megatron))
    if differing:
        raise UserError(
            f"{place} holds another model: {'; '.join(differing)}. Give the flags of the checkpoint's model, or name a "
            "checkpoint of this one."
        )


def different_fields(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between the models of two runs' arguments; what only one of them knows is not compared."""
    names = [name for name in _MODEL if name in there and name in here]
    if not here.get("group_query_attention") and not there.get("group_query_attention"):
        names = [name for name in names if name != _ONLY_WITH_GROUPS]
    if not here.get("num_experts") and not there.get("num_experts"):
        names = [name for name in names if name not in _ONLY_WITH_EXPERTS]
    return [
        f"{name}: {_plain(there[name])} there, {_plain(here[name])} here"
        for name in names
        if _plain(there[name]) != _plain(here[name])
    ]


def _plain(value: Any) -> Any:
    """Enumerations and tuples as a checkpoint's reader may have them."""
    value = getattr(value, "value", value)
    return list(value) if isinstance(value, tuple) else value


# The schedule --------------------------------------------------------------------------------------------------------


def _keep_warm_up(arguments: Arguments, stored: Mapping[str, Any]) -> None:
    """The same share of more steps would be another warm-up, of steps that are done."""
    told = arguments.megatron
    share = told.lr_warmup_fraction
    before = stored[_AS_TOLD] if stored[_AS_TOLD] is not None else stored["lr_warmup_fraction"]
    if share is not None and share == before and not told.override_opt_param_scheduler:
        decay = told.lr_decay_iters or told.train_iters
        arguments.set(**{"lr_warmup_fraction": stored["lr_warmup_steps"] / decay, _AS_TOLD: share})


def _refuse_another_schedule(arguments: Arguments, stored: Mapping[str, Any], root: str) -> None:
    told = arguments.megatron
    if told.override_opt_param_scheduler or told.use_checkpoint_opt_param_scheduler:
        return
    with refusals_of_megatron():
        here = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    there = _as_stored(here, stored, told.global_batch_size)
    done = int(stored["num_steps"])
    different = next(_different_steps(there, here, done, told.global_batch_size), None)
    if different is None:
        return
    was, of = stored["lr_decay_style"], stored["train_iters"]
    raise UserError(
        f"--load {root}: step {different.step} of the {done} that are done had the {different.what} "
        f"{different.there:g} ({was} over {of} steps), and would have {different.here:g} here "
        f"({told.lr_decay_style} over {told.train_iters} steps). Give --use-checkpoint-opt-param-scheduler (the "
        "schedule of the checkpoint), --override-opt-param-scheduler (this one, from here on), or the flags that the "
        "run began with."
    )


@dataclass(frozen=True)
class _Different:
    step: int
    what: str
    there: float
    here: float


def _different_steps(there: Any, here: Any, done: int, packs: int) -> Iterator[_Different]:
    """Steps that are done and would have been others."""
    for step in range(done):
        there.num_steps = here.num_steps = step * packs
        for what, method in (("learning rate", "get_lr"), ("weight decay", "get_wd")):
            values = [getattr(each, method)({}) for each in (there, here)]
            if not math.isclose(*values, rel_tol=1e-9, abs_tol=1e-15):
                yield _Different(step + 1, what, *values)


def _as_stored(here: Any, stored: Mapping[str, Any], packs: int) -> Any:
    """The scheduler of the checkpoint, which counts in steps where Megatron's counts in packs."""
    there = copy.copy(here)
    for name in ("max_lr", "min_lr", "lr_decay_style", "start_wd", "end_wd", "wd_incr_style"):
        setattr(there, name, stored[name])
    for name in ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps"):
        setattr(there, name, stored[name] * packs)
    there.init_lr = stored["lr_warmup_init"] or 0.0
    there.lr_wsd_decay_style = stored["lr_wsd_decay_style"]
    there.wsd_decay_steps = stored["lr_wsd_decay_iters"] and stored["lr_wsd_decay_iters"] * packs
    return there


# A directory that is used --------------------------------------------------------------------------------------------

#: Flags that may differ between two starts of one run: how long, when what is written, and where it is looked for.
_OF_A_START = frozenset(
    {
        "train-iters", "pair-epochs", "lr-decay-iters", "load", "save", "overwrite", "exit-interval",
        "exit-duration-in-mins", "exit-signal", "stop-file", "save-interval", "save-every",
        "save-retain-interval", "keep-checkpoints", "async-save", "async-strategy",
        "use-persistent-ckpt-worker", "eval-interval", "eval-every", "eval-every-minutes", "save-every-minutes",
        "log-interval", "num-workers", "recipe", "dry-run", "gpus-per-node", "gpu-memory", "gpu-tflops",
        "assumed-mfu", "override-opt_param-scheduler", "use-checkpoint-opt_param-scheduler",
        "checkpoint-checksums", "no-checkpoint-checksums", "megatron-output", "log-wide", "tensorboard-dir",
        "wandb-project", "wandb-exp-name", "wandb-save-dir", "phase-limit", "distributed-timeout-minutes",
        "push-to-hub", "mlflow-experiment", "swanlab-project",
    }
)  # fmt: skip


def go_on_in_used_directory(arguments: Arguments) -> str:
    """Without ``--load``: go on from the checkpoints in ``--save`` if they are this run's. Collective.

    Returns:
        What to say of it; empty where ``--save`` holds no checkpoint, or the user has said what to do.

    Raises:
        UserError: on every rank; they are another run's.
    """
    directories = arguments.settings.directories
    if not directories.save or directories.load or arguments.settings.checkpoints.overwrite:
        return ""
    save, found = directories.save, ""
    with all_ranks_agree():
        if is_rank_zero():
            found = _checkpoint_of_this_run(Path(save), arguments.recipe)
    found = broadcast(found)
    if not found:
        return ""
    arguments.set(load=save)
    return f"--save {save} holds {found} of this run: it goes on from there."


def _checkpoint_of_this_run(root: Path, settings: Mapping[str, Value]) -> str:
    named = named_checkpoint(root)
    if named is None:
        return ""
    what = f"step {named}" if named.isdigit() else "a checkpoint"
    ways = f"Add --load {root} to go on from there, --overwrite to begin again in its place, or name another --save."
    former = kept(root)
    if former is None:
        raise UserError(f"--save {root} holds {what} of a run that left no recipe. {ways}")
    here = {name: value for name, value in settings.items() if name not in _OF_A_START}
    there = {name: value for name, value in former.items() if name not in _OF_A_START}
    differing = [
        f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted({*here, *there})
        if _text(there.get(name)) != _text(here.get(name))
    ]
    if differing:
        raise UserError(f"--save {root} holds {what} of another run ({'; '.join(differing)}). {ways}")
    return what


def _text(value: Value) -> str:
    return str([str(each) for each in value]) if isinstance(value, list) else str(value)
