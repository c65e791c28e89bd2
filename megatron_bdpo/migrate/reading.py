"""A configuration as keys with values: YAML or JSON, nested or not, or the flags of a command in a shell script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megatron_bdpo.errors import UserError
from megatron_bdpo.migrate.entries import Value
from megatron_bdpo.user_files import read_regular

_MOST_BYTES = 10_000_000
_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Given:
    """One key of a configuration."""

    key: str
    """Of nested ones with points between them: ``policy.optimizer.kwargs.lr``."""
    value: Value
    where: str
    """File, line or flag, for messages."""
    is_default: bool = False
    """Not of the file, but what the trainer does without it."""

    @property
    def text(self) -> str:
        """The value as a word: ``true``, ``0.1``; of a list with commas."""
        if isinstance(self.value, list):
            return ",".join(self.value)
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value or "")

    @property
    def is_set(self) -> bool:
        return self.value not in (None, "", [])


def read(path: Path, programs: Mapping[str, str]) -> tuple[dict[str, Given], str | None]:
    """All keys of a file, and the name of the program that a script starts.

    Args:
        programs: for shell scripts, a regular expression of what stands before the flags for each name.

    Raises:
        UserError: it cannot be read, is neither, or holds a key twice.
    """
    try:
        text = read_regular(path, _MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Give a configuration in YAML or a shell script.") from error
    if path.suffix in (".yaml", ".yml", ".json"):
        return _resolved(_of_yaml(text, path)), None
    return _of_script(text, path, programs)


# YAML ----------------------------------------------------------------------------------------------------------------


def _of_yaml(text: str, path: Path) -> dict[str, Given]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: a configuration is a mapping of keys to values.")
        found: dict[str, Given] = {}
        for given in _flat(root, "", path):
            former = found.get(given.key)
            if former is not None and isinstance(former.value, list) and isinstance(given.value, list):
                given = replace(former, value=[*former.value, *given.value])
            elif former is not None:
                raise UserError(f"{given.where}: stands there twice. Keep one.")
            found[given.key] = given
        return found
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}. Mend it.") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply. Give a configuration.") from error


def _flat(node: yaml.Node, prefix: str, path: Path, *, listed: bool = False) -> Iterator[Given]:
    """The leaves below a mapping. Of a list of mappings, those of one name are one list."""
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        where = f"{path}, line {name.start_mark.line + 1}, {key}"
        match value:
            case yaml.MappingNode() if value.value:
                yield from _flat(value, f"{key}.", path, listed=listed)
            case yaml.MappingNode():
                yield Given(key, None, where)
            case yaml.SequenceNode():
                scalars = [str(item.value) for item in value.value if isinstance(item, yaml.ScalarNode)]
                if scalars or not value.value:
                    yield Given(key, scalars, where)
                for item in value.value:
                    if isinstance(item, yaml.MappingNode):
                        yield from _flat(item, f"{key}.", path, listed=True)
            case _:
                leaf = _scalar(value)
                yield Given(key, [str(value.value)] if listed and leaf is not None else leaf, where)


def _scalar(node: yaml.Node) -> Value:
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return bool(yaml.SafeLoader.bool_values.get(node.value.lower(), False))
    return str(node.value)


_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")


def _resolved(found: dict[str, Given]) -> dict[str, Given]:
    """With OmegaConf's references, ``${a.b}`` and ``${.sister}``, filled in; names of the environment stay."""

    def value_of(given: Given, seen: frozenset[str]) -> Value:
        if not isinstance(given.value, str):
            return given.value
        match = _REFERENCE.fullmatch(given.value)
        if match is None:
            text = _REFERENCE.sub(lambda part: _word(referred(part, given, seen)), given.value)
            if re.search(r"\$\{[\w.]*[.:](?!-)", text):
                raise UserError(f"{given.where}: {given.value!r} is computed. Write out what it comes to.")
            return text
        return referred(match, given, seen)

    def referred(match: re.Match[str], given: Given, seen: frozenset[str]) -> Value:
        dots, name = match.groups()
        around = given.key.split(".")[: -len(dots)] if dots else []
        target = ".".join([*around, name])
        if target not in found and not dots and "." not in name:
            return match[0]
        if target not in found or target in seen:
            raise UserError(f"{given.where}: {given.value!r} refers to nothing in this file. Write out what it is.")
        return value_of(found[target], seen | {target})

    return {key: replace(given, value=value_of(given, frozenset({key}))) for key, given in found.items()}


def _word(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# Shell ---------------------------------------------------------------------------------------------------------------


def _of_script(text: str, path: Path, programs: Mapping[str, str]) -> tuple[dict[str, Given], str | None]:
    """The flags of the one command that starts a training run, or of a text that holds nothing but flags."""
    lines = re.sub(r"\\[ \t]*\n", " ", re.sub(r"(?m)^\s*#.*$", "", text)).splitlines()
    starts = {
        (line[start.end() :], name)
        for line in lines
        for name, program in programs.items()
        if (start := re.search(rf"(?<![\w.-])(?:{program})(?=\s|$)", line))
    }
    if len(starts) > 1:
        raise UserError(f"{path} starts more than one training run. Give a file with one of the commands.")
    command, name = starts.pop() if starts else (" ".join(lines), None)
    found: dict[str, Given] = {}
    for key, value in _flags(_words(_expanded(command, _assigned(lines)), path), path):
        if key in found:
            raise UserError(f"{path}, --{key}: stands there twice. Keep one.")
        found[key] = Given(key, value, f"{path}, --{key}")
    if not found:
        raise UserError(
            f"{path}: no flags of a training run that this program knows. Give a configuration in YAML, or a shell "
            "script that starts one."
        )
    return found, name


def _words(command: str, path: Path) -> list[str]:
    """As the shell splits a command, up to what is another one's, or a comment."""
    command = _FOR_THE_SHELL.sub("", command)
    if computed := _COMPUTED.search(command):
        raise UserError(f"{path}: {computed[0]} is computed by the shell. Write out what it comes to.")
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""  # NAME#N is a word
        words = list(lexer)
    except ValueError as error:
        raise UserError(f"{path}: the command cannot be split into words: {error}. Mend its quotes.") from error
    is_end = [word.startswith("#") or (word != "" and set(word) <= set("|&;<>()")) for word in words]
    return words[: [*is_end, True].index(True)]


#: A descriptor before a redirection, and the script's own arguments.
_FOR_THE_SHELL = re.compile(r"(?<=\s)\d(?=[<>])|(?<=\s)(\"?)\$[@*]\1(?=\s|$)")
_COMPUTED = re.compile(r"\$\([^)]*\)?|`[^`]*`?")
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")
_QUOTIENT = re.compile(r"\$\((?:expr\s+|\(\s*)(\d+)\s*/\s*([1-9]\d*)\s*\)?\)")


def _assigned(lines: list[str]) -> dict[str, str]:
    """Variables that a script gives a value, written out, on a line of their own."""
    found: dict[str, str] = {}
    for line in lines:
        if match := re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(\"?)([^\s\"'$`]*)\2;?\s*", line):
            found[match[1]] = match[3]
    return found


def _expanded(command: str, assigned: Mapping[str, str]) -> str:
    """With the values of variables, and with quotients of whole numbers, as ms-swift's scripts have them.

    Other variables are the environment's. They are left to the recipe, in whose form they are then.
    """
    command = _VARIABLE.sub(lambda name: assigned.get(name[1] or name[2], f"${{{name[1] or name[2]}}}"), command)
    return _QUOTIENT.sub(lambda of: str(int(of[1]) // int(of[2])), command)


def _flags(words: list[str], path: Path) -> Iterator[tuple[str, Value]]:
    key: str | None = None
    values: list[str] = []
    for word in [*words, "--"]:
        if word.startswith("--"):
            if key is not None:
                yield key, _one(values)
            elif values:
                is_file = values[0].endswith((".yaml", ".yml", ".json"))
                advice = "Give that file in the place of this one" if is_file else "Give the flags alone"
                raise UserError(f"{path}: {values[0]!r} belongs to no flag. {advice}.")
            name, equals, value = word[2:].partition("=")
            key, values = name.replace("-", "_"), [value] if equals else []
        else:
            values.append(word)


def _one(values: list[str]) -> Value:
    if not values:
        return True
    if len(values) > 1:
        return values
    return {"true": True, "false": False}.get(values[0].lower(), values[0])
