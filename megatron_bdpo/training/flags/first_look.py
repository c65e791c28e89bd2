"""What flags and recipes show by themselves: refused, explained or printed before torch and Megatron are imported.

Both take seconds, on every rank. What passes here is read once more by the parsers themselves: ``arguments``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.flags import flag_help, flag_table, recipe, unknown
from megatron_bdpo.training.flags.flag_table import FlagTable, terms
from megatron_bdpo.training.flags.secrets import refuse_secrets

Program = Literal["train", "score", "tokenize"]

EXAMPLE = (
    "megatron-bdpo train --hf-model MODEL --pair-data pairs.jsonl --seq-length 4096 --pairs-per-step 64 "
    "--pair-epochs 1 --lr 5e-7 --bf16 --save RUN --save-interval 100"
)

#: Whatever else is given, a training run needs these.
_NEEDED = ("pair_data", "pairs_per_step", "seq_length", "lr")


def look_at(argv: Sequence[str] | None, program: Program) -> None:
    """Refuse flags that cannot be meant, and answer those that ask for words.

    Args:
        argv: the flags; ``sys.argv[1:]`` when None.

    Raises:
        UserError: an unknown flag, a wrong type, a secret, a recipe that cannot be used, an unknown loss or an option
            that it has not; of a training run, what is missing.
        SystemExit: --help, --help-all, --print-config: printed, once.
    """
    flags = sys.argv[1:] if argv is None else list(argv)
    table = flag_table.read()
    _answer_help(flags, table)
    # The options of a loss that comes from elsewhere are flags that the table does not know.
    if not table.is_of_this_installation or recipe.look_up("loss-file", flags) is not None:
        if "--print-config" in flags:
            raise UserError(
                f"--print-config knows the flags of megatron-core {table.megatron} and of the losses here, no others. "
                "Leave it out: a run keeps its recipe.yaml in --save."
            )
        return
    if not flags and program == "train":
        raise UserError(
            "nothing is given. A training run needs the model (--hf-model), the pairs (--pair-data) and the steps "
            f"(--seq-length, --pairs-per-step, --pair-epochs, --lr). For example: {EXAMPLE}"
        )
    parser = table.parser()
    parser.error = functools.partial(unknown.refuse, parser)  # type: ignore[method-assign]
    expanded = recipe.expand(parser, flags)
    values = vars(parser.parse_args(expanded))
    given = recipe.given(parser, expanded)
    refuse_secrets(given)
    _check_loss(values, table)
    if values["print_config"]:
        _print(_config(given, values, table))
    if program == "train":
        _check_needed(values)


def _answer_help(flags: Sequence[str], table: FlagTable) -> None:
    if "--help-all" in flags:
        _print(flag_help.in_full(table))
    if "--help" in flags or "-h" in flags:
        _print(flag_help.by_task(table))


def _print(text: str) -> None:
    """Print on the first rank, and end on all."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
    raise SystemExit(0)


def _check_loss(values: Mapping[str, Any], table: FlagTable) -> None:
    name, losses = values["preference_loss"], table.losses
    for term in terms(name):
        if term not in losses:
            told = unknown.loss_meaning(term, {each: loss.elsewhere for each, loss in losses.items()})
            raise UserError(
                " ".join([f"unknown loss '{term}'.", *([told] if told else []), f"There are {', '.join(losses)}."])
            )
    options = {option for loss in losses.values() for option in loss.options}
    for option in sorted(options - table.options_of(name)):
        if values[option] is not None:
            of = ", ".join(each for each, loss in losses.items() if option in loss.options)
            raise UserError(f"--{option.replace('_', '-')} is not used by the loss '{name}'. It is an option of: {of}.")


def _check_needed(values: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED if values[name] is None]
    if values["hf_model"] is None and values["num_layers"] is None:
        missing.insert(0, "hf_model")
    if values["train_iters"] is None and values["pair_epochs"] is None:
        missing.append("pair_epochs")
    if missing:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(f"missing: {listed}. For example: {EXAMPLE}")


def _config(given: Mapping[str, recipe.Value], values: Mapping[str, Any], table: FlagTable) -> str:
    """What was given as a recipe, and behind it, as comments, the defaults of our other flags."""
    used = table.options_of(values["preference_loss"])
    others = {option for loss in table.losses.values() for option in loss.options} - used
    own = [flag for title, flags in table.groups.items() if title.endswith(flag_help.OWN) for flag in flags]
    named = {key.removeprefix("no-") for key in given}
    defaults: dict[str, recipe.Value] = {
        key: flag.default if isinstance(flag.default, bool) else str(flag.default)
        for flag in own
        if flag.default is not None and flag.dest not in others
        if (key := flag.names[0].removeprefix("--")) not in named | {"print-config", "help-all"}
    }
    settings = {key: value for key, value in given.items() if key != "print-config"}
    commented = "".join(f"# {line}\n" for line in recipe.to_yaml(defaults).splitlines())
    return f"{recipe.to_yaml(settings) if settings else ''}\n# By default:\n{commented}".strip()
