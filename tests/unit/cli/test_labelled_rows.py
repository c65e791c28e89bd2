"""What the sub-commands of ``data`` say of labelled answers: of answers, not of pairs."""

from __future__ import annotations

import json

import pytest

from megatron_bdpo.cli.main import main
from tests.harness.program import TOKENIZER, run
from tests.unit.cli.test_data_commands import FORMATS

ROWS = [
    {"prompt": "Name a river.", "completion": " The Loire.", "label": True},
    {"prompt": "Name a river.", "completion": " The Loire.", "label": True},
    {"prompt": "Name a river.", "completion": " The Alps, which are mountains.", "label": False},
    {"prompt": "Name a river.", "completion": " The Loire.", "label": 0},
    {"prompt": "Name a hill.", "completion": " A hill.", "label": None},
]
PAIR = {"prompt": "Name a lake.", "chosen": " Como.", "rejected": " The Danube, which is a river."}


@pytest.fixture
def file(tmp_path):
    """Rows as a file, and its path."""

    def write(rows, name="rows"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_check(file, capsys):
    path = file(ROWS)
    assert main(["data", "check", path]) == 2, "a row without a label is broken"
    output = capsys.readouterr().out
    assert f"{path}, line 5: missing column: column 'label' is null" in output
    assert "labelled answers: 4 kept of 5 rows (1 dropped, 20.00%)" in output
    assert "  2 desirable (50.0%), 2 undesirable (50.0%)\n" in output
    assert f"  1 copies of an earlier labelled answer ({path}, line 2; see {path}, line 1)" in output
    both_ways = "1 labelled the other way than an earlier copy: they contradict each other"
    assert f"  {both_ways} ({path}, line 4; see {path}, line 1)" in output
    mixed = file([*ROWS[:3], PAIR], "mixed")
    assert main(["data", "check", mixed]) == 0
    output = capsys.readouterr().out
    assert "pairs and labelled answers: 4 kept of 4 rows (0 dropped, 0.00%)" in output
    assert "  1 pairs, 3 labelled answers: 2 desirable (66.7%), 1 undesirable (33.3%)" in output
    assert main(["data", "check", file(ROWS[:4]), str(FORMATS / "trl.jsonl"), "--json"]) == 2, "text and messages"
    assert main(["data", "check", file(ROWS[:4]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["desirable"], told["undesirable"]) == (2, 2) and told["repeats"]["labelled_both_ways"]["count"] == 1


def test_columns_of_other_names(file, capsys):
    renamed = [{"question": row["prompt"], "text": row["completion"], "thumb": row["label"]} for row in ROWS[:4]]
    columns = ["--pair-columns", "prompt=question,completion=text,label=thumb"]
    assert main(["data", "check", file(renamed), *columns]) == 0
    assert "labelled answers: 4 kept of 4 rows" in capsys.readouterr().out


def test_show(ranks, file):
    path = file([*ROWS[2:4], PAIR])
    for row, expected in (("1", "undesirable answer: "), ("3", "chosen: ")):
        ((code, output, errors),) = ranks(1)(run, "data", "show", path, "--row", row, *TOKENIZER)
        assert code == 0, errors
        assert f"\n{expected}" in output and output.count("of them scored") == (1 if row == "1" else 2)
        sizes = [int(line.split(":")[1].split()[0]) for line in output.splitlines() if " token" in line]
        assert output.splitlines()[-1] == f"positions in a pack: {sum(sizes[:-1])}"


def test_stats(ranks, file, tmp_path):
    cache = ["--pair-cache-dir", str(tmp_path / "cache")]
    ((code, output, errors),) = ranks(1)(run, "data", "stats", file(ROWS[:4]), *TOKENIZER, *cache, "--json")
    assert code == 0, errors
    told = json.loads(output)
    found, tokens, quality = told["statistics"], told["report"]["tokens"], told["quality"]
    assert (found["pairs"], found["answers"], found["desirable"], found["undesirable"]) == (4, 4, 2, 2)
    assert found["chosen_longer"] is found["length_difference"] is quality["length"] is None
    assert set(tokens) == {"prompt", "desirable", "undesirable"}
    in_answers = (tokens["desirable"]["mean"] + tokens["undesirable"]["mean"]) / 2
    assert found["mean_positions"] == pytest.approx(tokens["prompt"]["mean"] + in_answers), "an answer counts once"
    assert found["shared_prompt_saving"] == 0
    assert (quality["copies"]["count"], quality["flips"]["count"]) == (1, 3)
    assert quality["labels"]["mean_undesirable"] == tokens["undesirable"]["mean"]
    ((code, output, errors),) = ranks(1)(run, "data", "stats", file(ROWS[:4]), *TOKENIZER, *cache)
    assert code == 0 and "answers that do not fit a pack" in output and "positions of a answer" not in output
    assert "positions of an answer" in output and "chosen" not in output and "pair" not in output
    ((code, output, errors),) = ranks(1)(run, "data", "stats", file([*ROWS[:4], PAIR]), *TOKENIZER, *cache)
    assert code == 0 and "positions of a row" in output and "chosen is longer" in output
