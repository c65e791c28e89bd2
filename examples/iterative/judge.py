"""A judge to replace: `score(prompt, answer)` of any file, the higher the better; equal scores are not compared.

This one looks at words alone. It wants an answer that ends as a sentence does, is about fifteen words long, and takes
up the question's words. It needs nothing, and knows nothing: whether an answer is true it cannot see. A reward model,
a checker of answers or another model behind an API takes its place.
"""

from __future__ import annotations

import re
from typing import Any

ENDS = (".", "!", "?", "`", ")")
WORDS = 15


def score(prompt: str | list[dict[str, Any]], answer: str) -> float:
    """At most 2: 1 for the end, 1 for all the question's words of four letters or more, less what is off the length."""
    text = answer.strip()
    asked, said = (re.findall(r"\w+", each.lower()) for each in (_question(prompt), text))
    asked = [word for word in asked if len(word) > 3]
    taken_up = sum(word in said for word in asked) / max(1, len(asked))
    return float(text.endswith(ENDS)) + taken_up - abs(len(said) - WORDS) / WORDS


def _question(prompt: str | list[dict[str, Any]]) -> str:
    """What comes before the first question mark."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text.partition("?")[0]
