"""Modules as Markdown: signatures, fields and docstrings, read from the source without importing it.

Docstrings are Google's style. A formula, indented by four spaces, stays a block of code; `Args:` and
its like become lists.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes")


def of_module(root: Path, name: str) -> str:
    """The docstring of a module, as it stands."""
    return inspect.cleandoc(ast.get_docstring(_parsed(root, name)[0]) or "")


def page(root: Path, name: str) -> str:
    """A module's public names as Markdown, or those of one class: MODULE.CLASS."""
    module, _, member = name.rpartition(".")
    if member[:1].isupper():
        tree, source = _parsed(root, module)
        (found,) = [node for node in tree.body if isinstance(node, Definition) and node.name == member]
        return _definition(found, source, f"### {member}")
    tree, source = _parsed(root, name)
    parts = [f"### `{name}`", markdown(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            parts.append(_definition(node, source, f"#### {node.name}"))
    return "\n\n".join(part for part in parts if part)


def _parsed(root: Path, name: str) -> tuple[ast.Module, list[str]]:
    path = root.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = file.read_text("utf-8")
    return ast.parse(text), text.splitlines()


def _definition(node: Definition, source: list[str], heading: str) -> str:
    parts = [heading]
    if isinstance(node, ast.ClassDef):
        parts += [markdown(ast.get_docstring(node) or ""), "\n".join(_fields(node, source))]
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
                text = markdown(ast.get_docstring(each) or "")
                parts += [f"```python\n{_signature(each)}\n```", text]
    else:
        parts += [f"```python\n{_signature(node)}\n```", markdown(ast.get_docstring(node) or "")]
    return "\n\n".join(part for part in parts if part)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 100:
        return line
    arguments = re.sub(r", (?=\*?\*?\w+(?::|,|$|=))", ",\n    ", ast.unparse(node.args))
    return f"{node.name}(\n    {arguments},\n){returns}"


def _fields(node: ast.ClassDef, source: list[str]) -> list[str]:
    """A line for each field of a dataclass: its type, its default, and its comment or the docstring below it."""
    lines = []
    for each, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(each, ast.AnnAssign) or ast.unparse(each.target).startswith("_"):
            continue
        default = each.value
        shown = f" = {ast.unparse(default)}" if isinstance(default, ast.Constant | ast.UnaryOp) else ""
        comment = source[each.lineno - 1].partition("  # ")[2]
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            comment = " ".join(str(following.value.value).split())
        told = f": {_escaped(comment)}" if comment else ""
        lines.append(f"- `{ast.unparse(each.target)}: {ast.unparse(each.annotation)}{shown}`{told}")
    return lines


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
    lines: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            lines += ["", f"**{line[:-1]}**", ""]
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
            lines += ["", _escaped(line)]
        elif inside:
            entry = re.match(r" {4}(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): (.*)", line)
            if entry:
                lines.append(f"- `{entry[1]}`: {_escaped(entry[2])}")
            else:
                lines.append(f"  {_escaped(line.strip())}" if line.strip() else "")
        else:
            lines.append(line if line.startswith("    ") else _escaped(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _escaped(text: str) -> str:
    """Text whose `<` is no HTML; roles and double backticks become plain code."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "\\<") for part in parts)
