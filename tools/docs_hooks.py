"""What MkDocs does not do by itself: pages that are files of the repository, and lists read from the source.

{{ include PATH }}   the file, its links mended
{{ errors }}         every message of a UserError, by part of the package
{{ advice }}         what a run says of its numbers, with the flag to turn
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_PLACE = re.compile(r"^\{\{ (\w+) ?(\S*) \}\}$", re.M)
_LINK_OUT = re.compile(r"\[([^\]]+)\]\(\.\./(?!docs/)([^)]+)\)")
_LINK_TO_DOCS = re.compile(r"\]\((?:\.\./)?docs/")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return _mended(_PLACE.sub(lambda place: _CONTENT[place[1]](place[2]), markdown))


def _mended(markdown: str) -> str:
    """Links to pages as they are here; links out of the documentation as names of files."""
    return _LINK_OUT.sub(r"`\2`", _LINK_TO_DOCS.sub("](", markdown))


def _include(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def _errors(_: str) -> str:
    lines: list[str] = []
    for part in ("data", "losses", "training", "model", "logprobs", "planning", "report", "platform", "cli"):
        found = sorted(
            {message for file in (ROOT / "megatron_bdpo" / part).rglob("*.py") for message in messages(file)}
        )
        lines += ["", f"### {part}", "", *(f"- {_escaped(message)}" for message in found)]
    return "\n".join(lines)


def _escaped(message: str) -> str:
    return re.sub(r"([<>|*_`\[\]{}#])", r"\\\1", " ".join(message.split()))


def messages(file: Path) -> list[str]:
    """The texts of the UserErrors that a file raises; what is filled in is an ellipsis."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError" and node.args:
            text = _text(node.args[0])
            if len(text.replace("…", "").strip()) > 10:
                found.append(text)
    return found


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _text(left) + _text(right)
        case _:
            return "…"


def _advice(_: str) -> str:
    source = (ROOT / "megatron_bdpo" / "training" / "reporting" / "advice.py").read_text("utf-8")
    texts = [
        _text(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant | ast.JoinedStr) and "--" in _text(node) and " " in _text(node)
    ]
    whole = [text for text in dict.fromkeys(texts) if not any(text != other and text in other for other in texts)]
    filled = [re.sub(r"\{[^}]*\}", "…", text) for text in whole]
    return "\n".join(f"- {_escaped(text)}" for text in filled)


_CONTENT = {"include": _include, "errors": _errors, "advice": _advice}
