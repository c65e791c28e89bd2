"""What pages of the documentation take from the source: written into them, so that they read where they lie.

    python tools/pages.py             writes it anew (`make pages`)
    python tools/pages.py --check     says which pages are not current; a test does the same

and, beside them, the table of all flags that stands in for the parsers (`tools/flag_table.py`), and the terminal that
shows wrong flags (`tools/terminals.py`).

A page marks a place, whose content is everything up to the end:

    <!-- made: KIND ARGUMENT -->
    ...
    <!-- end -->

    file PATH       a file of the repository, as code
    api MODULE ...  a module's public names: signatures, fields, docstrings; of a class alone, MODULE.CLASS
    losses          the table of `megatron-bdpo losses --markdown`
    docstring NAME  of a module
    loss-errors     how far losses are from their oracles, as `tools/loss_errors.py` has measured
    formulas        of each loss, the docstring of the module that computes it
    formats         the formats of rows
    errors          every message of a UserError, by part of the package
    advice          what a run says of its numbers, with the flag to turn
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` beside the package, wherever this is started

from tools import docstrings

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_bdpo"

_PLACE = re.compile(r"^<!-- made: ([\w-]+)(?: ([^\n]+))? -->\n(?:.*?\n)??<!-- end -->$", re.M | re.S)
_LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash"}


def filled(markdown: str) -> str:
    """A page's text with the content of its places as the source says it today."""

    def place(found: re.Match[str]) -> str:
        content = _CONTENT[found[1]](found[2] or "").strip("\n")
        return f"{found[0].splitlines()[0]}\n\n{content}\n\n<!-- end -->"

    return _PLACE.sub(place, markdown)


def by_hand(markdown: str) -> str:
    """A page's text without what is made: only the places' marks stay."""
    return _PLACE.sub(lambda found: found[0].splitlines()[0], markdown)


def pages() -> list[Path]:
    return sorted((ROOT / "docs").glob("*.md"))


def outdated() -> list[Path]:
    """The pages whose text is not what the source says."""
    return [page for page in pages() if filled(page.read_text("utf-8")) != page.read_text("utf-8")]


def _file(path: str) -> str:
    text = (ROOT / path).read_text("utf-8").rstrip("\n")
    return f"```{_LANGUAGES[Path(path).suffix]}\n{text}\n```"


def _api(names: str) -> str:
    return "\n\n".join(docstrings.page(ROOT, name) for name in names.split())


def _losses(_: str) -> str:
    from megatron_bdpo.cli.main import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(["losses", "--markdown"])
    lines = output.getvalue()
    anchors = {name: ", ".join(names) for names in _modules_of_losses().values() for name in names}
    for name, heading in anchors.items():
        link = re.sub(r"[^\w-]", "", heading.replace(" ", "-"))
        lines = re.sub(rf"(?m)^\| `{name}` \|", f"| [`{name}`](#{link}) |", lines)
    return lines


def _modules_of_losses() -> dict[str, list[str]]:
    """Module -> the losses that it has."""
    from megatron_bdpo.losses import registry

    modules: dict[str, list[str]] = {}
    for name in registry.names():
        modules.setdefault(registry.get(name).function.__module__, []).append(name)
    return modules


def _loss_errors(_: str) -> str:
    found = json.loads((ROOT / "tests" / "oracles" / "loss_errors.json").read_text("utf-8"))
    trl = ".".join(found["trl"].split(".")[:2])
    head = ["closed form, fp64", f"TRL {trl}'s code for it", "fp64", "fp32"]
    tables = [_errors_table([title, *head], found[key]) for key, title in (("losses", "loss"), ("options", "dpo with"))]
    return "\n\n".join(tables)


def _errors_table(head: list[str], rows: dict[str, dict[str, str | float]]) -> str:
    lines = [head, ["---"] * len(head)]
    for name, found in rows.items():
        cells = [found.get(key, "") for key in ("closed form", "TRL's", "fp64", "fp32")]
        lines.append(
            [f"`{name}`", *(each if isinstance(each, str) else f"{each:.0e}" if each else "0" for each in cells)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _docstring(module: str) -> str:
    return f"```text\n{docstrings.of_module(ROOT, module)}\n```"


def _formulas(_: str) -> str:
    parts = []
    for module, names in _modules_of_losses().items():
        parts.append(f"### {', '.join(names)}\n\n{_docstring(module)}")
    return "\n\n".join(parts)


def _formats(_: str) -> str:
    from megatron_bdpo.data.formats import FORMATS

    rows = "\n".join(f"| `{each.name}` | {each.summary} |" for each in FORMATS)
    return f"| `--pair-format` | rows |\n|---|---|\n{rows}"


def _errors(_: str) -> str:
    lines: list[str] = []
    parts = sorted({file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in PACKAGE.rglob("*.py")})
    for part in parts:
        files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else (PACKAGE / part).rglob("*.py")
        if found := sorted({message for file in files for message in messages(file)}):
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
    source = (PACKAGE / "training" / "reporting" / "advice.py").read_text("utf-8")
    texts = [
        _text(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant | ast.JoinedStr) and "--" in _text(node) and " " in _text(node)
    ]
    whole = [text for text in dict.fromkeys(texts) if not any(text != other and text in other for other in texts)]
    filled_in = [re.sub(r"\{[^}]*\}", "…", text) for text in whole]
    return "\n".join(f"- {_escaped(text)}" for text in filled_in)


_CONTENT: dict[str, Callable[[str], str]] = {
    "file": _file,
    "api": _api,
    "losses": _losses,
    "docstring": _docstring,
    "loss-errors": _loss_errors,
    "formulas": _formulas,
    "formats": _formats,
    "errors": _errors,
    "advice": _advice,
}


def main() -> int:
    old = outdated()
    names = ", ".join(str(page.relative_to(ROOT)) for page in old)
    if "--check" in sys.argv[1:]:
        if old:
            print(f"not as the source says: {names}. `make pages` writes them anew.", file=sys.stderr)
        return int(bool(old))
    # In processes of their own: the first prepares the platform for Megatron.
    for script, *words in (("flag_table.py",), ("terminals.py", "wrong-flags")):
        subprocess.run([sys.executable, ROOT / "tools" / script, *words], check=True, stdout=subprocess.DEVNULL)
    for page in old:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    print(f"written: {names}" if old else "all pages are current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
