"""A judge to replace: `score(prompt, answer)` of any file, the higher the better; answers of equal scores make no pair.

This one prefers answers that end as a sentence does, and of these the shorter ones. It is a stand-in that needs
nothing: a reward model, a checker of answers or another model behind an API takes its place.
"""

from __future__ import annotations

from typing import Any

ENDS = (".", "!", "?", "`", ")")


def score(prompt: str | list[dict[str, Any]], answer: str) -> float:
    text = answer.strip()
    return (1.0 if text.endswith(ENDS) else 0.0) - len(text) / 10_000
