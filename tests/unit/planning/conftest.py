"""What the tests of the planning share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A directory with Llama 3 8B's configuration."""
    from tests.unit.training.test_dry_run import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)
