"""The versions that decide what a run does, as the installed packages tell them: none is imported."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from packaging.version import Version

from megatron_bdpo.errors import UserError

MEGATRON_MINIMUM = Version("0.19.2")
MEGATRON_BELOW = Version("0.20")

#: The first with ``torch.mm(out_dtype=)``: on a GPU, log-probs are fp32 sums of half-precision products. Megatron's own
#: bound is lower (2.6). "a0": NVIDIA's containers have builds from before a release. No upper bound: a newer torch is
#: the user's to choose, and what it takes is asked of it where releases differ (``model/varlen.py``).
TORCH_MINIMUM = Version("2.8.0a0")


def megatron_version() -> Version:
    """Version of the installed megatron-core; ``UserError`` when there is none."""
    try:
        return Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"megatron-core is not installed. Install it with: pip install 'megatron-core>={MEGATRON_MINIMUM},"
            f"<{MEGATRON_BELOW}' (its wheels need Python >= 3.12)."
        ) from error


#: What decides a run's numbers. Not all of it is there everywhere.
DECISIVE = (
    "megatron_bdpo", "megatron-core", "torch", "transformer-engine", "transformers", "datasets", "numpy", "safetensors",
    "tokenizers", "sentencepiece", "tiktoken", "triton", "nvidia-resiliency-ext",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers, of those that are installed; our commit if it is known."""
    found = {"python": platform.python_version()}
    for name in DECISIVE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if commit := source_commit():
        found["megatron_bdpo commit"] = commit
    return found


@functools.cache
def source_commit() -> str:
    """The commit that this package runs from, and whether its files differ from it; "" where nobody knows.

    Of a checkout by its git; of an installation from a repository by what pip has noted.
    """
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        return commit and commit + (" and changes" if _git(root, "status", "--porcelain", "-uno") else "")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        noted = importlib.metadata.distribution("megatron_bdpo").read_text("direct_url.json")
        return str(json.loads(noted or "")["vcs_info"]["commit_id"])
    return ""


def _git(root: Path, *arguments: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        return asked.stdout.strip() if asked.returncode == 0 else ""
    return ""
