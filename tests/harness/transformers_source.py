"""Which keys of a ``config.json`` transformers' code declares or reads, from the text of its source.

Parsing finds what a run would not: keys behind a condition, and those of releases that are not installed. The record
beside the tests is made from unpacked wheels, named ``transformers-RELEASE``:

    python -m tests.harness.transformers_source DIR/transformers-* > tests/hf/transformers_keys.json
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_bdpo.model.hf.families import FAMILIES

#: Folders of families that share one with others.
_FOLDERS = {"gemma3_text": "gemma3"}

#: What models of every family run through: configuration, loading, masks, positions, caches.
SHARED = ("configuration_utils", "modeling_utils", "masking_utils", "modeling_rope_utils", "cache_utils",
          "modeling_layers")  # fmt: skip
_CONFIGURATIONS = ("configuration_utils", "modeling_rope_utils")


def keys(package: Path, family: str) -> set[str]:
    """The keys that one family's own files declare or read."""
    name = _FOLDERS.get(family, family)
    folder = package / "models" / name
    configuration, modeling = (_tree(folder / f"{kind}_{name}.py") for kind in ("configuration", "modeling"))
    return (_declared(configuration) | _read(modeling)) - _methods(package)


def shared_keys(package: Path) -> set[str]:
    """The keys that the shared files declare or read."""
    read = set().union(*(_read(_tree(package / f"{name}.py")) for name in SHARED))
    return (read | _declared(_tree(package / "configuration_utils.py"))) - _methods(package)


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8") if file.exists() else "")


def _is_config(node: ast.expr) -> bool:
    names = ("config", "text_config", "decoder_config", "layer_config")
    return (isinstance(node, ast.Name) and node.id in names) or (
        isinstance(node, ast.Attribute) and node.attr == "config"
    )


def _read(tree: ast.Module) -> set[str]:
    """``config.KEY``, ``self.config.KEY``, ``getattr(config, "KEY")``, ``hasattr(config, "KEY")``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_config(node.value):
            found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            of, name = node.args[:2]
            if isinstance(name, ast.Constant) and _is_config(of):
                found.add(name.value)
    return found


def _declared(tree: ast.Module) -> set[str]:
    """Fields, arguments, attributes and other names (``attribute_map``) of the configuration classes."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {name for each in classes if each.name.endswith("Config") for name in _names(each)}


def _names(declared: ast.ClassDef) -> Iterator[str]:
    for node in declared.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not ast.unparse(node.annotation).startswith("ClassVar"):
                yield node.target.id
        elif isinstance(node, ast.Assign) and _targets(node) == ["attribute_map"]:
            yield from ast.literal_eval(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__"):
            yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
            yield from _set_in(node)


def _set_in(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("kwargs.pop", "kwargs.get"):
            yield from (name.value for name in node.args[:1] if isinstance(name, ast.Constant))


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _methods(package: Path) -> set[str]:
    """What is no key, because a file cannot set it: methods that are no properties, and what all objects have."""
    trees = [_tree(package / f"{name}.py") for name in _CONFIGURATIONS]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if not node.decorator_list} | {"self"} | set(dir(object))


def record(packages: Iterable[Path]) -> dict[str, dict[str, list[str]]]:
    """Family, or "shared" -> key -> the first and the last release that has it."""
    found: dict[str, dict[str, list[str]]] = {}
    for package in packages:
        release = package.name.split("-")[1]
        sets = {"shared": shared_keys(package / "transformers")}
        sets |= {family: keys(package / "transformers", family) for family in FAMILIES}
        for family, names in sets.items():
            for name in names:
                found.setdefault(family, {}).setdefault(name, [release, release])[1] = release
    return {family: dict(sorted(names.items())) for family, names in sorted(found.items())}


def _in_order(package: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", package.name)]


if __name__ == "__main__":
    packages = sorted(map(Path, sys.argv[1:]), key=_in_order)
    lines = [
        f" {json.dumps(family)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(releases)}" for name, releases in names.items())
        + "\n }"
        for family, names in record(packages).items()
    ]
    releases = json.dumps([package.name.split("-")[1] for package in packages])
    print(f'{{\n "releases": {releases},\n' + ",\n".join(lines) + "\n}")
