"""The page in a real browser, on a phone and on a desk: nothing is wrong with it, and nothing sticks out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_bdpo.cli.main import main
from tests.harness.browser import browser, find_browser
from tests.unit.report.test_heldout import evaluation, make_heldout
from tests.unit.report.test_report import make_run, make_scores

WIDTHS = (420, 1280)
#: No browser breaks it by itself.
WORD = "https://example.org/" + "a" * 300


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium on PATH: `make browser` installs it (Debian, root)")
    with browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One that has left everything, with texts that are as wide as they are allowed to be."""
    base = tmp_path_factory.mktemp(f"run {'long' * 20}")
    scores = make_scores(base / "scores")
    record = {
        "loss": "bdpo",
        "loss_options": {f"option_{number}": 0.123456 for number in range(30)},
        "reference_scores": {"train": str(scores)},
        "pairs": {"train": 123_456},
    }
    run = make_run(base / "run", record=record)
    random = np.random.default_rng(0)
    make_heldout(run, evaluation(0, random.normal(0, 1, 300)), evaluation(90, random.normal(1, 2, 300)))
    rows = [
        {"step": step, "prompt": f"Q{number} {WORD}", "answer": f"<script>alert({number})</script>\n{WORD}"}
        for step in (0, 90)
        for number in range(12)
    ]
    (run / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(run), "--show-text"]) == 0
    return run / "report" / "report.html"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_runs_page(chromium, run, tmp_path, width):
    look = chromium.look(run, width)
    (tmp_path / f"{width}.png").write_bytes(look.screenshot)  # for people
    assert look.errors == []
    assert look.scroll_width <= look.client_width == width
    names = {path.stem for path in run.parent.glob("*.png")}
    assert set(look.figures) == names and {"calibration", "heldout_margins", "reward_by_length"} <= names
    assert all(300 < wide <= width and 200 < high < wide for wide, high in look.figures.values()), look.figures


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<p>all is well</p>", (False, False, False)),
        ("<div style='width: 500px'>wide</div>", (False, True, False)),
        (f"<p>{WORD}</p>", (False, True, False)),
        ("<img alt='lost: x' src='data:image/png;base64,AAAA'>", (False, False, True)),
        ("<script>console.error('no')</script>", (True, False, False)),
        ("<script>throw new Error('no')</script>", (True, False, False)),
        ("<link rel='stylesheet' href='https://example.org/style.css'>", (True, False, False)),
    ],
    ids=["fine", "wide", "word", "picture", "console", "script", "request"],
)
def test_what_is_wrong_with_a_page_is_seen(chromium, tmp_path, body, expected):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>{body}")
    look = chromium.look(page, 420)
    found = (bool(look.errors), look.scroll_width > look.client_width, (0, 0) in look.figures.values())
    assert found == expected, look.errors
