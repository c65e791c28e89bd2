"""A loss as an object for ``json.dump``."""

from __future__ import annotations

from typing import Any

from megatron_bdpo.losses import registry
from megatron_bdpo.losses.base import AnyLossSpec


def describe(spec: AnyLossSpec) -> dict[str, Any]:
    """Name, summary, what it is of, what it reads with its default options, options, source."""
    needs = spec.requirements(spec.options())
    reads = {
        "scores of all answers": spec.takes == "groups",
        "labels of answers": spec.takes == "answers",
        "reference": needs.reference,
        "comprehension": needs.comprehension,
        "safety labels": needs.safety,
        "answers after other prompts": needs.mismatched,
        "its step": spec.looks_at_steps,
    }
    options = [
        {
            "flag": field.flag,
            "default": field.defaults[spec.name],
            "choices": list(field.choices or field.words),
            "help": field.help,
            "modifier": field.is_modifier,
        }
        for field in registry.option_fields([spec]).values()
    ]
    return {
        "name": spec.name,
        "summary": spec.summary,
        "of": spec.takes,
        "reads": [name for name, needed in reads.items() if needed],
        "options": options,
        "source": spec.source,
    }
