"""A report as one HTML file that needs nothing else: pictures are inside of it, and it names no address."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_bdpo.report.figures import Picture
from megatron_bdpo.report.scored_pairs import PERCENTILES, Comprehension, summary
from megatron_bdpo.report.text import shown_value
from megatron_bdpo.training.reporting.generations_file import SideBySide

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; max-width: 1240px;
       padding: 1.2rem clamp(.8rem, 3vw, 2.4rem) 3rem; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #d8d8d8; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 1.4rem 1.6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; max-width: 620px; } img { display: block; width: 100%; height: auto; }
figcaption { color: #444; font-size: .87rem; margin-top: .2rem; }
.wide { overflow-x: auto; margin-top: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .22rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e8e8e8; }
th { font-weight: 600; color: #333; }
th:first-child, td:first-child, .places th:last-child, .places td:last-child { text-align: left; }
.texts th, .texts td { text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .2rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .3rem 0 .8rem; }
.note { color: #444; max-width: 75ch; }
@media (max-width: 520px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .35rem; } }
"""


def page(title: str, facts: Mapping[str, str], sections: Iterable[str]) -> str:
    """The whole file."""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def pictures_section(title: str, pictures: Sequence[Picture], note: str = "") -> str:
    """A heading and its pictures."""
    return f"<h2>{escape(title)}</h2>{_note(note)}" + _pictures(pictures)


def comprehension_section(pairs: Comprehension, pictures: Sequence[Picture]) -> str:
    """Distributions as pictures and numbers."""
    header = ["", "mean", "sd", *(f"{percentile}%" for percentile in PERCENTILES)]
    rows = [[label, *(f"{n:.4f}" for n in summary(values))] for label, values in pairs.distributions().items()]
    per_token = " / |y|" if pairs.per_token else ""
    note = (
        f"Of {len(pairs.ids):,} pairs, in {pairs.unit}. I(x; y) is what the prompt x tells the reference about the "
        f"response y: [log π_ref(y|x) − log π_ref(y)]{per_token}. Weights and scale at temperature "
        f"τ = {pairs.temperature:.4g}: w = 2 softmax(−I/τ), s = √2/‖w‖."
    )
    return "<h2>Comprehension</h2>" + _note(note) + _pictures(pictures) + _table(header, rows)


def largest_section(pairs: Comprehension, count: int, texts: Mapping[int, Mapping[str, Any]]) -> str:
    """The most imbalanced pairs, and their texts where given, folded up."""
    indices = [int(index) for index in pairs.largest(count)]
    header = ["pair", "I_w", "I_l", "I_w − I_l", "w_w", "w_l", "s", "|y_w|", "|y_l|", "where"]
    rows = []
    for i in indices:
        numbers = [f"{value[i]:+.3f}" for value in (pairs.chosen, pairs.rejected, pairs.difference)]
        numbers += [f"{value:.3f}" for value in (*pairs.weights[i], pairs.scale[i])]
        rows.append([str(pairs.ids[i]), *numbers, *(str(n) for n in pairs.tokens[i]), pairs.place(i)])
    folded = "".join(
        f"<details><summary>pair {pairs.ids[i]}</summary>"
        + "".join(f"<b>{escape(name)}</b><pre>{escape(shown_value(v))}</pre>" for name, v in texts[i].items())
        + "</details>"
        for i in indices
        if i in texts
    )
    note = "A pair's number is its place in the token store and in the scores. |y| counts response tokens."
    return f"<h2>The {len(indices)} most imbalanced pairs</h2>" + _note(note) + _table(header, rows, "places") + folded


def answers_section(answers: SideBySide) -> str:
    """Prompts with the first and the last answer side by side."""
    first, last = answers.steps
    columns = 2 if first == last else 3
    header = ["prompt", f"step {first}", f"step {last}"][:columns]
    rows = [row[:columns] for row in answers.rows]
    note = "What the policy answers, greedily. An answer that ends in … was cut at the longest allowed."
    return "<h2>Answers</h2>" + _note(note) + _table(header, rows, "texts")


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _pictures(pictures: Sequence[Picture]) -> str:
    return '<div class="pictures">' + "".join(map(_figure, pictures)) + "</div>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{escape(picture.name)}: {caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
