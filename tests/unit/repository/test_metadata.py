"""What the repository says of itself agrees with the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import megatron_bdpo
from examples.smollm2 import fetch
from megatron_bdpo.platform import versions

ROOT = Path(__file__).parents[3]


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == megatron_bdpo.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_changes_of_this_version_are_listed():
    version = megatron_bdpo.__version__.partition(".dev")[0]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


TORCH = f"torch>={versions.TORCH_MINIMUM}"
MEGATRON = f"megatron-core>={versions.MEGATRON_MINIMUM},<{versions.MEGATRON_BELOW}"


def test_what_pip_asks_for_is_what_the_start_checks():
    settings = [node for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body if isinstance(node, ast.Assign)]
    required = {node.targets[0].id: node.value for node in settings}["INSTALL_REQUIRES"]
    assert {TORCH, MEGATRON} <= set(ast.literal_eval(required))


def test_the_real_models_extra_brings_what_reads_it():
    """The tests' environment has it all for other reasons, so that only a user's own would miss it."""
    extra = re.search(r"^SMOLLM2 = \[(.*)\]$", (ROOT / "setup.py").read_text("utf-8"), re.M)
    assert extra is not None
    assert set(fetch.NEEDS) - {"transformers"} <= set(re.findall(r'"([a-z]+)"', extra[1])) and "*HF" in extra[1]


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_documents_name_the_versions_that_the_start_checks(document):
    text = " ".join((ROOT / document).read_text("utf-8").split())
    assert f"`{MEGATRON}`" in text
    assert f"torch {versions.TORCH_MINIMUM.base_version.removesuffix('.0')} or newer" in text


def test_files_that_are_no_python_are_shipped():
    """A wheel has them only if setup.py says so."""
    package = ROOT / "megatron_bdpo"
    (data,) = re.findall(r"package_data=(\{.*\}),", (ROOT / "setup.py").read_text("utf-8"))
    shipped = {path for pattern in ast.literal_eval(data)["megatron_bdpo"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == shipped and package / "report" / "page.html" in shipped
