"""The model card of an exported model: what it was made of, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of a run. All values are shown as they are."""

    base_model: str = ""
    loss: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Of the held-out pairs, at the end."""
    flags: str = ""
    """As they were given, as a recipe."""


def model_card(facts: TrainingFacts, library: str = "transformers") -> str:
    """README.md of a model, with the header that Hugging Face reads.

    Args:
        library: that loads the model: of adapters peft.
    """
    header = ["---", f"library_name: {library}", "tags: [preference-optimization, megatron_bdpo]"]
    if base := name_on_hub(facts.base_model):
        header.append(f"base_model: {json.dumps(base)}")
    start = f"from `{facts.base_model}` " if facts.base_model else ""
    lines = [
        *header,
        "---",
        "",
        "# Model card",
        "",
        f"Trained {start}on preference pairs with megatron_bdpo, a plugin for NVIDIA Megatron.",
        "",
        f"Loss: {facts.loss or 'unknown'}",
        *_table("Data", facts.data),
        *_table("Settings", facts.settings),
        *_table("Held-out pairs at the end", facts.metrics),
        *(["", "## Flags as given", "", "```yaml", facts.flags.rstrip(), "```"] if facts.flags else []),
    ]
    return "\n".join(lines) + "\n"


def name_on_hub(model: str) -> str:
    """What the hub calls a model that is from it; empty of any other one: the hub refuses a path in a header."""
    found = re.search(r"models--([^/]+)--([^/]+)/snapshots/", model)
    if found:
        return "/".join(found.groups())
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and not Path(model).exists()
    return model if is_name else ""


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return ["", f"## {title}", "", "| | |", "|---|---|", *rows]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
