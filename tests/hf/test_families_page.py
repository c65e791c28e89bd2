"""docs/huggingface.md has the table of families that code and tests make: ``python -m tests.hf.test_families_page``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_bdpo.model.hf.families import FAMILIES, REFUSED
from tests.harness.tiny_models import MODELS, make_config
from tests.hf import test_gradients, test_logits

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "huggingface.md"
HEAD = """| `model_type` | models | beyond Llama's layers | real configurations | compared with transformers at |
|---|---|---|--:|---|
"""


def table() -> str:
    """A row for each family."""
    configs: list[dict[str, Any]] = json.loads((ROOT / "tests" / "hf" / "hub_configs.json").read_text("utf-8"))
    read = Counter(each["config"].get("model_type") for each in configs if not each.get("refused"))
    return HEAD + "".join(
        f"| `{name}` | {family.models} | {family.layers or '–'} | {read[name] or '–'} | {', '.join(layouts(name))} |\n"
        for name, family in FAMILIES.items()
    )


def layouts(family: str) -> list[str]:
    """Those at which tests compare all gradients of a tiny model of the family, and its logits."""
    known_as = FAMILIES[family].exported_as or family  # to transformers
    own = {name for name in MODELS if make_config(name)["model_type"] == known_as}
    found = dict.fromkeys(
        case.removeprefix(f"{name} ")
        for cases in (test_gradients.CASES, test_logits.CASES)
        for case, (name, *_) in cases.items()
        if name in own
    )
    return list(found)


def refused() -> str:
    """A line for each family that is refused with a reason."""
    return "".join(f"- `{name}`: {reason}.\n" for name, reason in REFUSED.items())


def test_the_page_has_the_table():
    page = PAGE.read_text("utf-8")
    assert table() in page
    assert refused() in page


def test_every_family_is_compared():
    for name in FAMILIES:
        assert {"TP1", "TP2", "PP2", "CP2"} <= set(layouts(name)), name


if __name__ == "__main__":
    print(table(), refused(), sep="\n")
