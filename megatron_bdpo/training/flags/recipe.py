"""Recipes: a job's flags in a YAML file, and a record of the flags of each start beside its checkpoints.

A recipe is a mapping of flags without their dashes. It is turned into the flags that it stands for, before those of the
command line, and Megatron's own parser reads the whole: a recipe can say what the command line can, and nothing else.

    num-layers: 80                 --num-layers 80
    bf16: true                     --bf16; `false` is the flag's --no-... form, and where it has none, no flag
    pair-data: [2, a.jsonl, b]     --pair-data 2 a.jsonl b
    eval-share: null               no flag, also where an earlier recipe has one

Of several recipes the later ones win, and the command line wins over all. In values, ``${NAME}`` and
``${NAME:-default}`` are the environment's, ``${RECIPE_DIR}`` is the directory that the recipe is in, and a leading
``~/`` is the home directory.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.flags.unknown import meaning

FLAG = "--recipe"
#: Of a command line alone.
NOT_IN_RECIPES = frozenset({FLAG, "--help", "--help-all", "--print-config"})

#: A value as YAML has it: numbers stay text, which the flag's own type reads (YAML takes 5e-7 for a string).
Value = bool | str | list[str] | None


@dataclass(frozen=True)
class Setting:
    """One line of a recipe."""

    key: str
    value: Value
    where: str
    """File, line and key, for messages."""
    directory: Path
    """What ``${RECIPE_DIR}`` is."""


def expand(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The command line with its recipes replaced by the flags that they stand for.

    Args:
        parser: knows all flags; its ``error`` raises UserError.

    Raises:
        UserError: with file, line and key.
    """
    sources, rest = _split(argv)
    settings: dict[str, Setting] = {}
    for source in sources:
        for setting in _read(source):
            # One argument may have two flags, --x and --no-x: the later one wins over either.
            settings[_action(parser, setting).dest] = setting
    flags = parser._option_string_actions
    overridden = {flags[flag].dest for flag in (word.split("=")[0] for word in rest) if flag in flags}
    tokens: list[str] = []
    for name, setting in settings.items():
        # What the command line overrides is not looked at: its variables need not be set.
        if name not in overridden and setting.value is not None:
            tokens += _tokens(parser, _expanded(setting))
    return [*tokens, *rest]


def look_up(key: str, argv: Sequence[str]) -> str | None:
    """The value of one flag that takes one, before there is a parser that knows all flags.

    Raises:
        UserError: the flag stands without a value, or a recipe cannot be used.
    """
    sources, rest = _split(argv)
    looking = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    looking.add_argument(f"--{key}", dest="value")
    try:
        value: str | None = looking.parse_known_args(rest)[0].value
    except argparse.ArgumentError as error:
        raise UserError(f"--{key} needs a value: {error}.") from error
    if value is not None:
        return value
    found = [setting for source in sources for setting in _read(source) if setting.key == key]
    if not found or found[-1].value is None:
        return None
    told = _expanded(found[-1]).value
    if not isinstance(told, str):
        raise UserError(f"{found[-1].where}: --{key} takes one value.")
    return told


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The recipes of a command line, and what else stands there."""
    splitter = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    splitter.add_argument(FLAG, action="append", default=[])
    try:
        known, rest = splitter.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{FLAG} needs a file: {error}.") from error
    return known.recipe, rest


# Reading -------------------------------------------------------------------------------------------------------------


def _read(source: str) -> Iterator[Setting]:
    """The settings of a file, or of a mapping that stands on the command line itself."""
    if source.lstrip().startswith("{"):
        return _parse(source, f"{FLAG} {source}", Path.cwd())
    try:
        path = Path(source).expanduser()
        text = path.read_text("utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # of its name too
        raise UserError(f"{FLAG} {source} cannot be read: {error}") from error
    return _parse(text, source, path.resolve().parent)


def _parse(text: str, name: str, directory: Path) -> Iterator[Setting]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line}: not YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{name}: not YAML that a recipe can be: it is nested too deeply.") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}: a recipe is a mapping of flags without their dashes, such as `num-layers: 80`.")
    seen: dict[str, int] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{name}, line {line}: a key has to be a flag.")
        where = f"{name}, line {line}, {key.value}"
        if key.value in seen:
            raise UserError(f"{where}: stands in line {seen[key.value]} too.")
        seen[key.value] = line
        yield Setting(key.value, _value(value, where), where, directory)


_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


def _value(node: yaml.Node, where: str) -> Value:
    if isinstance(node, yaml.SequenceNode):
        return [_text(item, where) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
        return None
    if isinstance(node, yaml.ScalarNode) and node.tag == _BOOL:
        if node.value.lower() not in yaml.SafeLoader.bool_values:  # of a tag that is written out
            raise UserError(f"{where}: {node.value!r} is neither true nor false.")
        return bool(yaml.SafeLoader.bool_values[node.value.lower()])
    return _text(node, where)


def _text(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag in (_BOOL, _NULL):
        raise UserError(f"{where}: a value is a number, a string, true, false, or a list of numbers and strings.")
    return str(node.value)


# Flags ---------------------------------------------------------------------------------------------------------------


def _action(parser: argparse.ArgumentParser, setting: Setting) -> argparse.Action:
    flags = parser._option_string_actions
    action = flags.get(f"--{setting.key}")
    if action is None or f"--{setting.key}" in NOT_IN_RECIPES:
        told = meaning(setting.key, flags).replace("Did you mean --", "Did you mean ")
        raise UserError(" ".join([f"{setting.where}: no flag of that name can stand in a recipe.", told]).strip())
    return action


def _expanded(setting: Setting) -> Setting:
    """The setting with the variables and the home directory in its values filled in."""

    def variable(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name == "RECIPE_DIR":
            return str(setting.directory)
        value = os.environ.get(name, default)
        if value is None:
            raise UserError(
                f"{setting.where}: the environment has no {name}. Set it, or override --{setting.key} on the "
                "command line."
            )
        return value

    def fill(text: str) -> str:
        filled = _VARIABLE.sub(variable, text)
        return str(Path(filled).expanduser()) if filled.startswith("~/") else filled

    match setting.value:
        case str():
            return replace(setting, value=fill(setting.value))
        case list():
            return replace(setting, value=[fill(item) for item in setting.value])
        case _:
            return setting


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def _tokens(parser: argparse.ArgumentParser, setting: Setting) -> list[str]:
    action, flag, value = _action(parser, setting), f"--{setting.key}", setting.value
    is_switch = action.nargs == 0
    if is_switch != isinstance(value, bool):
        expected = "true or false" if is_switch else "a value (in quotes, if YAML takes it for true or false)"
        raise UserError(f"{setting.where}: --{setting.key} takes {expected}.")
    if isinstance(value, bool):
        return _switch(parser, action, setting)
    if isinstance(value, list) and action.nargs is None:
        raise UserError(f"{setting.where}: --{setting.key} takes one value, not a list.")
    if isinstance(value, list) and len(value) == 1 and value[0].startswith("-"):
        value = value[0]  # which argparse would take for a flag where it stands alone
    tokens = [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]
    try:
        unknown = parser.parse_known_args(tokens)[1]
    except UserError as error:
        raise UserError(f"{setting.where}: {error}") from error
    if unknown:
        raise UserError(f"{setting.where}: {unknown[0]!r} looks like a flag and cannot be one of several values.")
    return tokens


def _switch(parser: argparse.ArgumentParser, action: argparse.Action, setting: Setting) -> list[str]:
    flag = f"--{setting.key}"
    if setting.value:
        return [flag]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [other for other in action.option_strings if other.startswith("--no-") != flag.startswith("--no-")][:1]
    opposite = parser._option_string_actions.get(f"--no-{setting.key}")
    if opposite is not None and opposite.dest == action.dest:
        return [f"--no-{setting.key}"]
    if parser.get_default(action.dest) == action.const:
        raise UserError(
            f"{setting.where}: {flag} is on by default in this environment, and Megatron has no flag to switch it off."
        )
    return []


# Keeping -------------------------------------------------------------------------------------------------------------


def given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Value]:
    """What stands in ``argv``, whether or not it says the default, as a recipe has it. The parser is spent afterwards.

    Args:
        parser: that has read ``argv`` without error.
    """
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.type = action.choices = None
    values = vars(parser.parse_known_args(list(argv))[0])
    actions = {action.dest: action for action in parser._actions if action.dest in values}
    # Both flags of one argument are named by their own action: the one whose constant it is.
    for action in parser._actions:
        if action.nargs == 0 and action.const is not None and values.get(action.dest) == action.const:
            actions[action.dest] = action
    settings: dict[str, Value] = {}
    for name, value in values.items():
        action = actions[name]
        is_constant = action.nargs == 0 and action.const is not None
        settings[action.option_strings[0].removeprefix("--")] = True if is_constant else value
    return settings


def keep(directory: Path, settings: Mapping[str, Value], facts: Mapping[str, object]) -> Path:
    """Write the settings of a start: ``recipe.yaml``, and where those of the start before differ, ``recipe.2.yaml``...

    The first start's is never written over, and a requeued job that starts as before leaves nothing behind.

    Args:
        facts: what else decides the result (versions, ranks), for the comment at the head.

    Returns:
        The file that holds them.
    """
    text = "".join(f"# {name}: {value}\n" for name, value in facts.items()) + "\n" + to_yaml(settings)
    number, path = 1, directory / "recipe.yaml"
    former: Path | None = None
    while path.exists():
        former, number = path, number + 1
        path = directory / f"recipe.{number}.yaml"
    if former is not None and former.read_text("utf-8") == text:
        return former
    write_whole(path, text)
    return path


def check_reads_as(text: str, settings: Mapping[str, Value]) -> None:
    """Raise UserError where a text is no recipe of just these settings."""
    read = {setting.key: setting.value for setting in _parse(text, "the recipe", Path.cwd())}
    if read != settings:
        wrong = sorted(key for key in read.keys() | settings.keys() if read.get(key) != settings.get(key))
        raise UserError(f"a recipe cannot hold these values: {', '.join(wrong)}. Give them as flags.")


def kept(directory: Path) -> dict[str, Value] | None:
    """The settings of the last start that left some in a directory; None where there are none that can be read."""
    number = 1
    path = directory / "recipe.yaml"
    while (after := directory / f"recipe.{number + 1}.yaml").exists():
        number, path = number + 1, after
    try:
        return {setting.key: setting.value for setting in _read(str(path))}
    except UserError:
        return None


def to_yaml(settings: Mapping[str, Value]) -> str:
    """The settings as a recipe. What the environment holds under the name of a secret is written as its name."""
    pairs = [(_scalar(key), _node(value)) for key, value in settings.items()]
    return str(yaml.serialize(yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False), width=1000))


def _node(value: Value) -> yaml.Node:
    if isinstance(value, bool):
        return yaml.ScalarNode(_BOOL, str(value).lower())
    if isinstance(value, list):
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_scalar(item) for item in value], flow_style=True)
    return _scalar(str(value))


def _scalar(text: str) -> yaml.ScalarNode:
    """Plain where YAML's reading does not matter to us, which is all but true, false and null."""
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode("tag:yaml.org,2002:str" if tag in (_BOOL, _NULL) else tag, text)
