"""Megatron's arguments and ours: parsed from the command line, read into ``Settings``, and changed here alone."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import registry
from megatron_bdpo.platform import cpu
from megatron_bdpo.training.flags import recipe
from megatron_bdpo.training.flags.secrets import refuse_secrets
from megatron_bdpo.training.flags.unknown import refuse
from megatron_bdpo.training.settings import FLAG_GROUPS, Settings, read_settings

#: What Megatron's local (non-TE) layers need; chosen for the user where Transformer Engine is not installed.
LOCAL_LAYER_DEFAULTS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}

#: Where W&B keeps its files of a run without --save.
_WANDB_FILES = "runs/wandb"

CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "num_workers": 0,
}

#: Megatron's defaults that are wrong for preference pairs. ``None`` marks what the step plan sets, so that a value
#: given by the user is seen and refused.
PAIR_DEFAULTS = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "calculate_per_token_loss": True,  # exact per-pair normalisation: see training.forward
    "micro_batch_size": None,
    "global_batch_size": None,
    "dataloader_type": None,
    "eval_iters": None,
    "log_interval": 1,
    "eval_interval": 100,
    # The pairs of a step are few, and balanced experts are not what they are to teach: biases stay as they were.
    "moe_router_bias_update_rate": 0.0,
    # Validate every step, the first too, and stop at once. Megatron's own default repeats the step, saves, and goes on
    # only on another GPU.
    "rerun_mode": "disabled",
}


class Arguments:
    """Megatron's arguments, ours among them. Whoever has this may hand them to Megatron's functions; to know what they
    say, read ``settings``.

    Attributes:
        megatron: what Megatron's functions are handed.
        recipe: what was given, as a recipe has it.
        given: argument name -> flag, of what was given.
    """

    def __init__(self, megatron: argparse.Namespace, given: dict[str, recipe.Value], flags: Mapping[str, str]) -> None:
        self.megatron = megatron
        self.recipe = given
        self.given = flags
        self._seq_length = megatron.seq_length
        # Virtual stages are what Megatron's validation derives. Signals are answered by us: see ``stopping``.
        self.set(virtual_pipeline_model_parallel_size=None, exit_signal_handler=False)

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> Arguments:
        """Parse Megatron's flags and ours, those of recipes included; Megatron has not validated them yet.

        Args:
            argv: the flags, without the program name; ``sys.argv`` when None.
            defaults: default values by argument name.

        Raises:
            UserError: an unknown flag, a wrong type, a secret, a default that names no argument, a recipe that cannot
                be used.
            SystemExit: argparse's own, for ``--help``.
        """
        parsers: list[argparse.ArgumentParser] = []
        program = sys.argv
        flags = program[1:] if argv is None else argv

        def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parsers.append(parser)
            own_loss = registry.use_file(recipe.look_up("loss-file", flags))  # its options become flags
            _extend(parser, defaults or {})
            if own_loss:
                parser.set_defaults(preference_loss=own_loss.spec.name)
            sys.argv = [program[0], *recipe.expand(parser, flags)]  # which is what Megatron's parser reads
            return parser

        try:
            parsed = parse_args(extra_args_provider=provide)
            given = recipe.given(parsers[0], sys.argv[1:])
            refuse_secrets(given)
            names = {parsers[0]._option_string_actions[f"--{key}"].dest: f"--{key}" for key in given}
            return cls(parsed, given, names)
        finally:
            sys.argv = program

    @property
    def settings(self) -> Settings:
        """What they say now. ``seq_length`` is the user's, whatever Megatron has been told since."""
        return read_settings({**vars(self.megatron), "seq_length": self._seq_length}, self.given)

    @property
    def given_values(self) -> dict[str, object]:
        """Values of what was given, by argument name."""
        return {name: vars(self.megatron)[name] for name in self.given}

    @property
    def scored_vocab_size(self) -> int:
        """Entries that log-probs are normalised over, once they are validated."""
        return int(self.megatron.scored_vocab_size)

    @property
    def iteration(self) -> int:
        """Optimizer steps that are done, by Megatron's count: of a run that goes on, those of its checkpoint."""
        return int(self.megatron.iteration)

    def set(self, **values: object) -> None:
        """Change arguments: nothing else does."""
        vars(self.megatron).update(values)

    def copy(self) -> Arguments:
        """Others that say the same, for what changes them as it reads."""
        return copy.deepcopy(self)

    def log_to_wandb_too(self) -> None:
        """What Megatron wants beside ``--wandb-project``, where the user has not said it: names and places of files.

        It writes metrics to W&B only beside TensorBoard's files.
        """
        told = self.megatron
        if not told.wandb_project:
            return
        place = Path(told.wandb_save_dir or told.save or _WANDB_FILES)
        self.set(
            wandb_exp_name=told.wandb_exp_name or Path(told.save or time.strftime("%Y-%m-%d %H:%M")).name,
            wandb_save_dir=told.wandb_save_dir or (None if told.save else str(place)),
            tensorboard_dir=told.tensorboard_dir or str(Path(told.save or place) / "tensorboard"),
        )


def _extend(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Megatron's parser with our flags, our defaults and our way to refuse."""
    add_preference_arguments(parser)
    parser.error = functools.partial(refuse, parser)  # type: ignore[method-assign]
    mend_help(parser)
    known = {action.dest for action in parser._actions}
    for group in _default_groups(defaults):
        if unknown := group.keys() - known:
            raise UserError(f"defaults for unknown arguments: {', '.join(sorted(unknown))}")
        parser.set_defaults(**group)


def mend_help(parser: argparse.ArgumentParser) -> None:
    """A help text of Megatron's holds a bare per cent sign, on which argparse fails: --help would be a traceback."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _default_groups(own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups: list[Mapping[str, Any]] = [PAIR_DEFAULTS]
    if importlib.util.find_spec("transformer_engine") is None:
        groups.append(LOCAL_LAYER_DEFAULTS)
    if cpu.is_active():
        groups.append(CPU_DEFAULTS)
    return [*groups, own]


def add_preference_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag of ours to ``parser``: a group for each part of the settings, and one for the losses' options."""
    group = parser.add_argument_group("recipes and losses (megatron_bdpo)")
    group.add_argument(
        recipe.FLAG,
        action="append",
        metavar="FILE",
        help="flags in a YAML file, or in braces: '{lr: 1e-6}'. Later recipes win, the command line wins over all",
    )
    looking = [each.name for each in registry.all_specs() if each.looks_at_steps]
    group.add_argument(
        "--preference-loss",
        default="bdpo",
        help=f"one of: {', '.join(registry.names())}. A step of {', '.join(looking)} takes one more forward pass",
    )
    group.add_argument(
        "--loss-file", metavar="FILE", help="a Python file with a loss of your own, SPEC, which is then the loss"
    )
    group.add_argument("--help-all", action="store_true", help="show all flags, Megatron's too")
    group.add_argument("--print-config", action="store_true", help="print the settings that result, as a recipe")
    for title, settings in FLAG_GROUPS.items():
        ArgumentGroupFactory(settings).build_group(parser, f"{title} (megatron_bdpo)")
    _add_loss_options(parser)


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "options of the preference losses (megatron_bdpo)", "An option that the chosen loss does not use is refused."
    )
    for option in registry.option_fields().values():
        defaults = ", ".join(f"{loss} {value}" for loss, value in option.defaults.items())
        if option.is_modifier:
            defaults = f"{next(iter(option.defaults.values()))}; with {', '.join(option.defaults)}"
        keywords: dict[str, Any] = {
            "dest": option.name,
            "default": None,
            "help": f"{option.help} (default: {defaults})",
        }
        if option.type is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            parse = functools.partial(_number_or_word, option.type, option.words) if option.words else option.type
            keywords |= {"type": parse, "choices": option.choices}
        group.add_argument(option.flag, **keywords)


def _number_or_word(number: type, words: Sequence[str], text: str) -> Any:
    if text in words:
        return text
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and not {' or '.join(words)}") from None
