"""What the repository says of itself agrees with the package."""

from __future__ import annotations

from pathlib import Path

import yaml

import megatron_bdpo

ROOT = Path(__file__).parents[2]


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == megatron_bdpo.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_changes_of_this_version_are_listed():
    version = megatron_bdpo.__version__.partition(".dev")[0]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
