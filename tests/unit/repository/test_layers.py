"""The architecture as the sources have it: who imports whom, who patches and names what, how long files are."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_bdpo.losses import registry

ROOT = Path(__file__).parents[3]
OURS = "megatron_bdpo"

#: Part of the package -> the parts it may import from. What is not listed may import nothing, and be imported by none.
MAY_IMPORT = {
    "errors": set(),
    "artifact": set(),
    "hub": set(),
    "json_shape": set(),
    "user_files": set(),
    "display": {"display", "errors"},
    "comprehension": {"errors"},
    "losses": {"losses", "comprehension", "user_files", "errors"},
    "data": {"data", "display", "artifact", "hub", "json_shape", "user_files", "errors"},
    "logprobs": {"logprobs", "errors"},
    "model": {"model", "logprobs", "hub", "json_shape", "user_files", "errors"},
    "platform": {"platform", "errors"},
    "planning": {"planning", "display", "errors"},
    "training": {
        "training",
        "planning",
        "model",
        "logprobs",
        "data",
        "losses",
        "comprehension",
        "platform",
        "display",
        "artifact",
        "json_shape",
        "user_files",
        "errors",
    },
}
MAY_IMPORT["score"] = MAY_IMPORT["tokenize"] = MAY_IMPORT["train"] = {"training"}
MAY_IMPORT["report"] = {
    "report",
    "display",
    "artifact",
    "json_shape",
    "user_files",
    "training",
    "data",
    "losses",
    "comprehension",
    "errors",
}
MAY_IMPORT["migrate"] = {"migrate", "training", "user_files", "errors"}
MAY_IMPORT[""] = {"training"}  # the public names, read when they are asked for
MAY_IMPORT["cli"] = {"cli", *MAY_IMPORT, ""}
MAY_IMPORT["__main__"] = {"cli"}

#: Where Megatron may be imported at all, and where its trainer.
USES_MEGATRON = {"logprobs", "model", "platform", "training", "cli"}
USES_TRAINER = {"model", "platform", "training", "cli"}

#: Whose modules nobody but the platform changes.
PATCHABLE = {"megatron", "torch", "transformer_engine", "apex"}

MOST_LINES = 450


@dataclass(frozen=True)
class Source:
    """A file of the package, parsed."""

    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        """'losses', 'data', ...: the sub-package, or the module at the top; '' for the package's own __init__."""
        inner = self.path.relative_to(ROOT / OURS)
        return inner.parts[0] if len(inner.parts) > 1 else inner.stem.replace("__init__", "")

    @property
    def package(self) -> list[str]:
        """Dotted name of the package that the file is in."""
        return list(self.path.relative_to(ROOT).parts[:-1])

    def imports(self) -> Iterator[tuple[str, str]]:
        """(module, the name it is bound to) of every import, wherever in the file it stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, alias.asname or alias.name.split(".")[0]
            elif isinstance(node, ast.ImportFrom):
                base = self.package[: len(self.package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield f"{module}.{alias.name}", alias.asname or alias.name


SOURCES = [Source(path, ast.parse(path.read_text("utf-8"))) for path in sorted((ROOT / OURS).rglob("*.py"))]


def wrong_imports(file: Source) -> list[str]:
    """Imports that the file's layer does not allow."""
    wrong = []
    for module, _ in file.imports():
        top, *rest = module.split(".")
        if top == OURS:
            allowed = (rest[0] if rest else "") in MAY_IMPORT.get(file.part, set())
        elif top == "megatron":
            allowed = file.part in (USES_TRAINER if rest[:1] == ["training"] else USES_MEGATRON)
        else:
            allowed = True
        if not allowed:
            wrong.append(module)
    return wrong


def patches(file: Source) -> list[str]:
    """Assignments to attributes of Megatron's or torch's modules, or of what is imported from them."""
    foreign = {name for module, name in file.imports() if module.split(".")[0] in PATCHABLE}
    found = []
    for node in ast.walk(file.tree):
        is_target = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        is_setattr = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
        target = node if is_target else node.args[0] if is_setattr and node.args else None
        if target is not None and root_name(target) in foreign:
            found.append(ast.unparse(target))
    return found


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def comparisons_with(file: Source, words: set[str]) -> list[str]:
    """Comparisons with any of these strings."""
    return [
        ast.unparse(node)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and part.value in words for part in [node.left, *node.comparators])
    ]


def offenders(check: Callable[[Source], object], parts: Callable[[str], bool] = lambda part: True) -> dict[str, object]:
    """What a check finds, by file, where it finds anything."""
    found = {str(file.path.relative_to(ROOT)): check(file) for file in SOURCES if parts(file.part)}
    return {name: value for name, value in found.items() if value}


def test_every_part_of_the_package_has_its_layer():
    assert {file.part for file in SOURCES} <= {*MAY_IMPORT, ""}, "say in MAY_IMPORT what the new part may import"


def test_imports_are_from_the_own_layer_or_lower_ones():
    assert offenders(wrong_imports) == {}


def test_only_the_platform_patches():
    assert offenders(patches, lambda part: part != "platform") == {}
    assert offenders(patches, lambda part: part == "platform") != {}, "the check does not see them any more"


def test_no_file_is_too_long():
    assert offenders(lambda file: max(0, len(file.path.read_text("utf-8").splitlines()) - MOST_LINES)) == {}


def test_only_the_losses_know_the_names_of_losses():
    """Everything else asks the registry what a loss needs: no `if loss == ...`."""
    names = set(registry.names())
    assert offenders(lambda file: comparisons_with(file, names), lambda part: part != "losses") == {}


def test_only_the_training_reads_megatrons_global_arguments():
    def reads(file: Source) -> list[str]:
        return [module for module, name in file.imports() if module.startswith("megatron.") and name == "get_args"]

    assert offenders(reads, lambda part: part != "training") == {}


def test_one_file_names_gpt_model():
    """Megatron announces its replacement."""

    def names(file: Source) -> list[str]:
        return [module for module, _ in file.imports() if module.endswith(".GPTModel")]

    assert list(offenders(names)) == ["megatron_bdpo/model/pair_gpt.py"]


# The checks themselves


def made_up(text: str, name: str) -> Source:
    return Source(ROOT / OURS / name, ast.parse(text))


@pytest.mark.parametrize(
    ("line", "name", "expected_wrong"),
    [
        ("import megatron.core", "losses/x.py", ["megatron.core"]),
        ("def f():\n    from megatron_bdpo.data import step_plan", "losses/x.py", ["megatron_bdpo.data.step_plan"]),
        ("from ..model import digest", "logprobs/x.py", ["megatron_bdpo.model.digest"]),
        ("from megatron.training import get_args", "logprobs/x.py", ["megatron.training.get_args"]),
        ("import megatron_bdpo", "errors.py", ["megatron_bdpo"]),
        ("from megatron.core import parallel_state", "model/x.py", []),
        ("from megatron_bdpo.losses import registry", "training/x.py", []),
        ("import torch", "losses/x.py", []),
    ],
)
def test_the_check_of_imports(line, name, expected_wrong):
    assert wrong_imports(made_up(line, name)) == expected_wrong


@pytest.mark.parametrize(
    ("line", "expected_patches"),
    [
        ("trainer.train = f", ["trainer.train"]),
        ("a, trainer.train = f, g", ["trainer.train"]),
        ("trainer.nested.x += 1", ["trainer.nested.x"]),
        ("del trainer.train", ["trainer.train"]),
        ("setattr(trainer, name, f)", ["trainer"]),
        ("get_args().seed = 1", []),  # an object of the run, not a module
        ("x = trainer.train", []),
        ("own.train = f", []),
    ],
)
def test_the_check_of_patches(line, expected_patches):
    head = "import megatron.training.training as trainer\nfrom megatron.training import get_args\n"
    assert patches(made_up(head + line, "training/x.py")) == expected_patches
