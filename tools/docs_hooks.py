"""What MkDocs does not do by itself: pages that lie elsewhere in the repository, and links out of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Files of the repository that are pages of the site too.
ELSEWHERE = {"slurm/README.md": "slurm.md", "CHANGELOG.md": "changes.md"}

_LINK_OUT = re.compile(r"\[([^\]]+)\]\(\.\./(?!docs/)([^)]+)\)")
_LINK_TO_DOCS = re.compile(r"\]\((?:\.\./)?docs/")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with what it has found in docs/."""
    from mkdocs.structure.files import File  # of the extra docs alone

    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    for path, page in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{path}", f"]({page}")
    return _LINK_OUT.sub(r"`\2`", _LINK_TO_DOCS.sub("](", markdown))
