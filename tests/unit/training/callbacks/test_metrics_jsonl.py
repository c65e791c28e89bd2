"""Records go to metrics.jsonl at once; what the file keeps of them is in test_metrics_file.py."""

from __future__ import annotations

import json

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.callbacks.metrics_jsonl import MetricsJsonl
from tests.harness.moments import METRICS, evaluation, start, steps_record

pytestmark = pytest.mark.usefixtures("alone")


def test_a_line_per_record(tmp_path):
    file = MetricsJsonl(tmp_path)
    file.after_load(start())
    file.after_record(steps_record(1))
    file.after_record(evaluation(1))
    step, held_out = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert step == {"kind": "step", "iteration": 1, **steps_record(1).rates, **METRICS}
    assert held_out == {"kind": "evaluation", "iteration": 1, **METRICS}


def test_a_run_that_goes_on_does_its_last_steps_again(tmp_path):
    for first in (0, 2):
        file = MetricsJsonl(tmp_path)
        file.after_load(start(first))
        for iteration in range(first + 1, 4):
            file.after_record(steps_record(iteration, loss=10.0 * first + iteration))
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(record["iteration"], record["loss"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written"):
        MetricsJsonl(tmp_path).after_load(start())
