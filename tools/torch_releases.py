"""Record which parameters the functions of torch that change between its releases take, from the wheels on PyPI.

    python tools/torch_releases.py 2.10.0 2.11.0      # adds those to tests/unit/model/torch_releases.json

A release's wheel for macOS has the same Python sources as those for Linux in 70 to 140 MB. Nothing of it is run, and
it is deleted again. A function is recorded as the parameters of each of its overloads with their defaults, without
types; [] where the release has no such function.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RECORD = Path(__file__).parents[1] / "tests" / "unit" / "torch_releases.json"

#: Function -> the file of the wheel that says what it takes.
FUNCTIONS = {
    "varlen_attn": "torch/nn/attention/varlen.py",
    "mm": "torch/_C/_VariableFunctions.pyi",
    "addmm": "torch/_C/_VariableFunctions.pyi",
}


def main(releases: list[str]) -> None:
    """Add the releases to the record, in order of their numbers."""
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for release in releases:
        with tempfile.TemporaryDirectory() as folder:
            record[release] = signatures(download(release, Path(folder)))
    ordered = sorted(record, key=lambda release: [int(part) for part in release.split(".")])
    RECORD.write_text(json.dumps({release: record[release] for release in ordered}, indent=1) + "\n", "utf-8")


def download(release: str, folder: Path) -> Path:
    """The wheel for macOS on ARM."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", f"--dest={folder}"]
    options += [f"--platform=macosx_{major}_0_arm64" for major in range(11, 16)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"torch=={release}"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def signatures(wheel: Path) -> dict[str, list[str]]:
    """Function -> the parameters of each of its overloads, as between the brackets of a definition."""
    with zipfile.ZipFile(wheel) as files:
        there = set(files.namelist())
        trees = {path: ast.parse(files.read(path)) for path in set(FUNCTIONS.values()) & there}
    return {
        name: [
            parameters(node.args)
            for node in (trees[path].body if path in trees else [])
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        for name, path in FUNCTIONS.items()
    }


def parameters(arguments: ast.arguments) -> str:
    """Names and defaults."""
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    return ast.unparse(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
