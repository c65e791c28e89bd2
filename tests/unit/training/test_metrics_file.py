"""metrics.jsonl: what is appended, and what a resumed run keeps of it."""

from __future__ import annotations

import json

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.metrics_file import NAME, MetricsFile, read


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, iteration, *records):
    file = MetricsFile(path, iteration)
    for kind, record in records:
        file.append(kind, record)
    return file


@pytest.fixture
def path(tmp_path):
    return tmp_path / NAME


def test_a_line_per_record(path):
    write(path, 0, ("evaluation", {"iteration": 0.0, "loss": 0.7}), ("step", {"iteration": 1.0, "rewards/margins": -2}))
    assert lines(path) == [
        {"kind": "evaluation", "iteration": 0, "loss": 0.7},
        {"kind": "step", "iteration": 1, "rewards/margins": -2},
    ]
    assert read(path) == lines(path)


def test_what_is_not_finite_is_null(path):
    """NaN is no JSON."""
    write(path, 0, ("step", {"iteration": 1.0, "loss": float("nan"), "grad_norm": float("inf"), "scale": 1.0}))
    assert lines(path) == [{"kind": "step", "iteration": 1, "loss": None, "grad_norm": None, "scale": 1.0}]


def test_resumed_run_drops_what_it_does_again(path):
    write(path, 0, *(("step", {"iteration": float(i), "loss": i}) for i in range(1, 6)))
    write(path, 3, ("step", {"iteration": 4.0, "loss": 40}))
    assert [(line["iteration"], line["loss"]) for line in lines(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [file.name for file in path.parent.iterdir()] == [NAME]


def test_evaluation_of_a_finished_run_is_not_repeated(path):
    evaluation = ("evaluation", {"iteration": 2.0, "loss": 0.5})
    write(path, 0, ("step", {"iteration": 2.0, "loss": 0.6}), evaluation, evaluation)
    write(path, 2, evaluation)
    assert [line["kind"] for line in lines(path)] == ["step", "evaluation"]


def test_new_run_in_the_same_directory_begins_anew(path):
    write(path, 0, ("evaluation", {"iteration": 0.0, "loss": 1}), ("step", {"iteration": 1.0, "loss": 1}))
    write(path, 0, ("evaluation", {"iteration": 0.0, "loss": 2}))
    assert [line["loss"] for line in lines(path)] == [2]


@pytest.mark.parametrize("torn", ['{"kind": "step", "iter', '{"kind": "step", "iteration": 2, "loss": 2}'])
def test_line_of_a_killed_run_is_dropped(path, torn):
    """What has no line end may be half a number."""
    write(path, 0, ("step", {"iteration": 1.0, "loss": 1}))
    path.write_text(path.read_text() + torn)
    assert [record["iteration"] for record in read(path)] == [1]
    write(path, 1, ("step", {"iteration": 2.0, "loss": 2}))
    assert [line["loss"] for line in lines(path)] == [1, 2]


@pytest.mark.parametrize(
    "bad", ["{", "[1]", '{"kind": "step"}', '{"iteration": 3}', '{"kind": "step", "iteration": "3"}']
)
def test_line_that_is_no_record_is_named(path, bad):
    write(path, 0, ("step", {"iteration": 1.0, "loss": 1}))
    path.write_text(path.read_text() + bad + "\n")
    with pytest.raises(UserError, match=rf"{NAME}, line 2 is no record"):
        MetricsFile(path, 1)


def test_directory_in_its_place_is_refused(path):
    path.mkdir()
    with pytest.raises(UserError, match=rf"{NAME} cannot be written"):
        MetricsFile(path, 0)


def test_lost_disk_does_not_end_the_run(path, capsys):
    file = write(path, 0)
    path.unlink()
    path.parent.rmdir()
    for iteration in (1.0, 2.0):
        file.append("step", {"iteration": iteration, "loss": 1})
    assert capsys.readouterr().out.count("WARNING") == 1
