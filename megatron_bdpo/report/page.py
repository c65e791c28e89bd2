"""A report as one HTML file that needs nothing else: what is in its sections; ``page.html`` is how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from megatron_bdpo.data.quality import DataQuality
from megatron_bdpo.report.curves import Curves
from megatron_bdpo.report.figures import Picture
from megatron_bdpo.report.heldout import HeldOutPairs
from megatron_bdpo.report.heldout_labels import TITLES, HeldOutLabels
from megatron_bdpo.report.scored_pairs import PERCENTILES, Comprehension, summary
from megatron_bdpo.report.text import shown_value
from megatron_bdpo.training.reporting.generations_file import SideBySide


@dataclass(frozen=True)
class Section:
    """A heading with what is below it; what is empty is left out."""

    title: str
    note: str = ""
    pictures: Sequence[Picture] = ()
    caption: str = ""
    """Of the table."""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    kind: str = "numbers"
    """The table's class in the style: numbers or places."""
    answers: SideBySide | None = None
    folded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Summary -> texts by name, shown when the reader opens it."""


@dataclass(frozen=True)
class Tile:
    """A number to see first."""

    name: str
    value: str
    beside: str = ""
    """In small letters: what it was."""


def page(title: str, facts: Mapping[str, str], tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The whole file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        title=title, facts=facts, tiles=tiles, sections=sections, shown=_ANSWERS
    )


#: Prompts whose answers are seen at once; the others are folded up.
_ANSWERS = 8


#: Names of metrics, what a tile calls them, and how it writes them.
_TILES = (
    ("rewards/accuracies", "accuracy", "{:.1%}"),
    ("rewards/margins", "reward margin", "{:+.3f}"),
    ("loss", "loss", "{:.4f}"),
)


def tiles(curves: Curves, pairs: int | None) -> list[Tile]:
    """The last values of the main metrics beside the first: of the held-out pairs if they are evaluated.

    Args:
        pairs: that are trained on, where it is known.
    """
    found, of = (curves.held_out, "held-out ") if "loss" in curves.held_out else (curves.training, "training ")
    made = [Tile("steps", f"{curves.last_iteration:,}", f"{pairs:,} training pairs" if pairs else "")]
    for metric, name, form in _TILES:
        if metric in found:
            values = [form.format(value) for value in found[metric].values[[0, -1]]]
            steps = found[metric].iterations[[0, -1]].tolist()
            beside = f"{values[0]} after step {steps[0]}" if steps[0] != steps[1] else f"after step {steps[1]}"
            made.append(Tile(of + name, values[1], beside))
    return made


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
    return Section("Comprehension", note, pictures, header=header, rows=rows)


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
    """What is wrong with the pairs and labelled answers, as pictures and numbers."""
    note = f"Of {quality.pairs:,} {quality.what} of {quality.prompts:,} prompts that are trained on. " + "; ".join(
        f"{name}: {value}" for name, value in quality.length_facts()
    )
    rows = [[words, f"{f.count:,}", f"{f.of:,}", f"{f.share:.2%}", f.example] for words, f in quality.rows()]
    header = ["", "number", "of", "share", "the first one"]
    return Section(f"Quality of the {quality.what}", note, pictures, header=header, rows=rows, kind="places")


def answers_section(answers: SideBySide) -> Section:
    """Prompts with the first and the last answer side by side."""
    note = "What the policy answers, greedily. An answer that ends in … was cut at the longest allowed."
    return Section("Answers", note, answers=answers)


def heldout_section(pairs: HeldOutPairs, pictures: Sequence[Picture]) -> Section:
    """The rewards of single held-out pairs."""
    after = pairs.after
    note = (
        f"Of {len(after.margins):,} held-out pairs at the latest evaluation, after step {after.step}. Rewards are as "
        "the loss defines them."
    )
    if after.left_out:
        note += f" {after.left_out:,} more have a reward that is not finite."
    rows = [
        [f"{each.predicted:.3f}", f"{each.right:.3f}", "{:.3f} to {:.3f}".format(*each.interval), f"{each.pairs:,}"]
        for each in after.calibration()
    ]
    header = ["predicted", "right", "95% interval", "pairs"]
    return Section("Held-out pairs", note, pictures, "Calibration", header, rows)


def labels_section(labels: HeldOutLabels, pictures: Sequence[Picture]) -> Section:
    """The rewards of single held-out answers, by their labels."""
    note = (
        f"Of {len(labels.after):,} held-out labelled answers at the latest evaluation, after step {labels.after.step}. "
        "Apart: of all couples of a desirable and an undesirable answer, the share in which the desirable one has the "
        "higher reward."
    )
    return Section("Held-out labelled answers", note, pictures, "Rewards by label", list(TITLES), labels.rows())
