"""What anybody wrote into a file reaches a terminal as text: escapes in the place of controls, at every edge."""

from __future__ import annotations

import io

import pytest

from megatron_bdpo import display
from megatron_bdpo.cli.main import main
from megatron_bdpo.display import Facts, Table, terminal
from megatron_bdpo.errors import UserError, visible

EVIL = "a\x1b]0;owned\x07\x9b2J\x08\u202eb"
SHOWN = r"a\x1b]0;owned\x07\x9b2J\x08\u202eb"


def test_controls_become_escapes():
    assert visible(EVIL) == SHOWN
    assert visible("a line\n\tand ü 漢 👩‍👩‍👧 another") == "a line\n\tand ü 漢 👩‍👩‍👧 another"
    for code in [*range(32), *range(127, 160)]:
        assert visible(chr(code)).isprintable() or chr(code) in "\n\t"


def test_an_error_shows_none():
    for message in (f"{EVIL} is no file. Name one.", f"several\nlines of {EVIL}"):
        assert SHOWN in UserError(message).as_text() and "\x1b" not in UserError(message).as_text()


@pytest.mark.parametrize("draw", [lambda blocks, out: display.show(*blocks, stream=out),
                                  lambda blocks, out: terminal.draw(blocks, out, 200)])  # fmt: skip
def test_what_is_shown_shows_none(draw):
    out = io.StringIO()
    draw([EVIL, Table([EVIL], [[EVIL]], title=EVIL), Facts([(EVIL, EVIL)])], out)
    assert out.getvalue().count(SHOWN) == 6
    assert not any(control in out.getvalue() for control in EVIL if not control.isprintable())


def test_a_row_and_the_name_of_its_file(tmp_path, capfd):
    path = tmp_path / f"{EVIL}.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n', "utf-8")
    assert main(["data", "check", str(path)]) == 2
    told = "".join(capfd.readouterr())
    assert f"{SHOWN}.jsonl, line 1" in told and "\x1b" not in told and "\x9b" not in told
