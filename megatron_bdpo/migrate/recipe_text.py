"""A translation as a recipe's text: a comment at each line says where it comes from, those at the end what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_bdpo.errors import visible
from megatron_bdpo.migrate.translation import Translation
from megatron_bdpo.training.flags import recipe


def recipe_text(translation: Translation, file: str) -> str:
    """The recipe, read again by the reader of recipes.

    Raises:
        UserError: the reader finds something else in it than was meant.
    """
    lines = [_comment(f"From {file}, a configuration of {translation.source.title}: megatron-bdpo migrate"), ""]
    for flag, value in translation.settings.items():
        told = "; ".join(filter(None, [translation.origins[flag], translation.notes.get(flag)]))
        lines.append(f"{recipe.to_yaml({flag: value}).rstrip()}  {_comment(told)}")
    lines += _section("Without effect here:", translation.unneeded.items())
    lines += _section("NOT translated:", translation.refused.items())
    text = "\n".join(lines) + "\n"
    recipe.check_reads_as(text, translation.settings)
    return text


def _section(title: str, items: Iterable[tuple[str, str]]) -> list[str]:
    told = [_comment(f"  {key}: {reason}") for key, reason in items]
    return ["", _comment(title), *told] if told else []


def _comment(text: str) -> str:
    return visible(f"# {' '.join(text.split()) if not text.startswith('  ') else '  ' + ' '.join(text.split())}")


def summary(translation: Translation) -> Mapping[str, object]:
    """The whole of it for programs."""
    return {
        "source": translation.source.name,
        "recipe": translation.settings,
        "origins": translation.origins,
        "notes": translation.notes,
        "without_effect": translation.unneeded,
        "refused": translation.refused,
    }
