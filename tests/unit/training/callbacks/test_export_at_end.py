"""The policy is exported once, at the end, with the last evaluation."""

from __future__ import annotations

from megatron_bdpo.training.callbacks.export_at_end import ExportAtEnd
from tests.harness.moments import evaluation, start, steps_record


def test_with_the_last_evaluation():
    exported = []
    callback = ExportAtEnd(lambda *told: exported.append(told))
    callback.after_load(start(model=["chunk"]))
    for record in (evaluation(0), evaluation(4, loss=0.25), steps_record(5)):
        callback.after_record(record)
    assert exported == []
    callback.finished()
    assert exported == [(["chunk"], evaluation(4, loss=0.25).values, "abc")]


def test_on_a_rank_that_has_no_metrics():
    exported = []
    callback = ExportAtEnd(lambda model, metrics, base: exported.append(metrics))
    callback.after_load(start())
    callback.finished()
    assert exported == [{}]


def test_not_of_a_run_that_stops():
    callback = ExportAtEnd(lambda model, metrics, base: 1 / 0)
    callback.after_load(start())
    callback.stopped(3, "")
