"""The terminals in the documentation show what the program writes today."""

from __future__ import annotations

import html
import re

import pytest

from megatron_bdpo.display.blocks import Line
from megatron_bdpo.training.callbacks import console_lines
from tools import terminals


def text_of(svg: str) -> list[str]:
    """The lines of a picture, as they stand in the terminal."""
    lines: dict[int, list[str]] = {}
    for x, number, text in re.findall(r'<text [^>]*x="([\d.]+)"[^>]*-line-(\d+)\)"[^>]*>(.*?)</text>', svg):
        line = lines.setdefault(int(number), [" "] * terminals.COLUMNS)
        shown = html.unescape(text).replace("\xa0", " ")
        place = round(float(x) / 12.2)  # width of a letter, in rich's export
        line[place : place + len(shown)] = shown
    return ["".join(lines.get(number, "")).rstrip() for number in range(max(lines) + 1)]


def kept(name: str) -> str:
    return (terminals.PICTURES / f"{name}.svg").read_text("utf-8")


def test_wrong_flags():
    assert kept("wrong-flags") == terminals.picture("wrong-flags"), "python tools/terminals.py wrong-flags"
    text = "\n".join(text_of(kept("wrong-flags")))
    assert "error: unrecognized arguments: --pairs-per-stp 8.\nadvice: Did you mean --pairs-per-step?" in text


METRICS = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}


def test_the_demos_lines_are_those_of_the_code():
    """Written once more from their own numbers."""
    lines = [line for line in text_of(kept("demo")) if re.match(r"(step +\d+/40|held out, after step \d+) \| ", line)]
    assert len(lines) == 2 + 6
    for line in lines:
        place, *parts = line.split(" | ")
        words = dict(part.rsplit(" ", 1) if part[0].isalpha() else (part.split()[1], part.split()[0]) for part in parts)
        metrics = {metric: float(words[name]) for name, metric in METRICS.items()}
        metrics |= {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
        if "pairs/s" in words:
            metrics["throughput/pairs_per_second"] = float(words["pairs/s"])
        hours, minutes, seconds = map(int, words.get("ETA", "0:0:0").split(":"))
        remaining = 3600 * hours + 60 * minutes + seconds if "ETA" in words else None
        first, _ = console_lines.metric_parts(metrics, remaining)
        assert line == Line([(place, ""), *first]).plain(), "python tools/terminals.py demo"


def test_the_demos_table_has_the_rows_of_the_code():
    text = text_of(kept("demo"))
    start = next(number for number, line in enumerate(text) if line.startswith("held-out pairs  "))
    labels = [re.split(r" {2,}", line)[0] for line in text[start + 2 :] if line]
    assert labels == [label for label, *_ in console_lines._ROWS], "python tools/terminals.py demo"


@pytest.mark.parametrize("name", terminals.SESSIONS)
def test_pictures_need_nothing_else(name):
    """No font, no picture, no script from elsewhere."""
    assert not re.findall(r"url\((?!#)|@import|@font-face|<script|href=", kept(name))


def test_what_stays_of_a_terminal():
    """A line that is drawn over, one that is taken away, and colours."""
    output = "a\r\nbar 1\r\x1b[2Kb\r\nbar 2\r\n\r\x1b[1A\x1b[2K\x1b[31mc\x1b[0m\r\n"
    assert terminals._lines(output) == ["a", "b", "\x1b[31mc\x1b[0m", ""]
