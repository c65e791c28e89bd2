"""A report as one HTML file that needs nothing else: what is in its sections; ``page.html`` is how it looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from megatron_bdpo.data.quality import DataQuality
from megatron_bdpo.report.figures import Picture
from megatron_bdpo.report.scored_pairs import PERCENTILES, Comprehension, summary
from megatron_bdpo.report.text import shown_value
from megatron_bdpo.training.reporting.generations_file import SideBySide


@dataclass(frozen=True)
class Section:
    """A heading with what is below it; what is empty is left out."""

    title: str
    note: str = ""
    pictures: Sequence[Picture] = ()
    header: Sequence[str] = ()
    """Of the table."""
    rows: Sequence[Sequence[str]] = ()
    kind: str = "numbers"
    """The table's class in the style: numbers, places or texts."""
    folded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Summary -> texts by name, shown when the reader opens it."""


def page(title: str, facts: Mapping[str, str], sections: Iterable[Section]) -> str:
    """The whole file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(title=title, facts=facts, sections=sections)


def comprehension_section(pairs: Comprehension, pictures: Sequence[Picture]) -> Section:
    """Distributions as pictures and numbers."""
    per_token = " / |y|" if pairs.per_token else ""
    note = (
        f"Of {len(pairs.ids):,} pairs, in {pairs.unit}. I(x; y) is what the prompt x tells the reference about the "
        f"response y: [log π_ref(y|x) − log π_ref(y)]{per_token}. Weights and scale at temperature "
        f"τ = {pairs.temperature:.4g}: w = 2 softmax(−I/τ), s = √2/‖w‖."
    )
    header = ["", "mean", "sd", *(f"{percentile}%" for percentile in PERCENTILES)]
    rows = [[label, *(f"{n:.4f}" for n in summary(values))] for label, values in pairs.distributions().items()]
    return Section("Comprehension", note, pictures, header, rows)


def largest_section(pairs: Comprehension, count: int, texts: Mapping[int, Mapping[str, Any]]) -> Section:
    """The most imbalanced pairs, and their texts where given, folded up."""
    indices = [int(index) for index in pairs.largest(count)]
    header = ["pair", "I_w", "I_l", "I_w − I_l", "w_w", "w_l", "s", "|y_w|", "|y_l|", "where"]
    rows = []
    for i in indices:
        numbers = [f"{value[i]:+.3f}" for value in (pairs.chosen, pairs.rejected, pairs.difference)]
        numbers += [f"{value:.3f}" for value in (*pairs.weights[i], pairs.scale[i])]
        rows.append([str(pairs.ids[i]), *numbers, *(str(n) for n in pairs.tokens[i]), pairs.place(i)])
    folded = {
        f"pair {pairs.ids[i]}": {name: shown_value(value) for name, value in texts[i].items()}
        for i in indices
        if i in texts
    }
    note = "A pair's number is its place in the token store and in the scores. |y| counts response tokens."
    title = f"The {len(indices)} most imbalanced pairs"
    return Section(title, note, header=header, rows=rows, kind="places", folded=folded)


def quality_section(quality: DataQuality, pictures: Sequence[Picture]) -> Section:
    """What is wrong with the pairs, as pictures and numbers."""
    note = f"Of {quality.pairs:,} pairs of {quality.prompts:,} prompts that are trained on. " + "; ".join(
        f"{name}: {value}" for name, value in quality.length_facts()
    )
    rows = [[words, f"{f.count:,}", f"{f.of:,}", f"{f.share:.2%}", f.example] for words, f in quality.rows()]
    return Section(
        "Quality of the pairs", note, pictures, ["", "number", "of", "share", "the first one"], rows, kind="places"
    )


def answers_section(answers: SideBySide) -> Section:
    """Prompts with the first and the last answer side by side."""
    first, last = answers.steps
    columns = 2 if first == last else 3
    header = ["prompt", f"step {first}", f"step {last}"][:columns]
    note = "What the policy answers, greedily. An answer that ends in … was cut at the longest allowed."
    return Section("Answers", note, header=header, rows=[row[:columns] for row in answers.rows], kind="texts")
