"""status.json follows the run."""

from __future__ import annotations

import json

from megatron_bdpo.training.callbacks.status_file import StatusFile
from tests.harness.moments import start, step


def test_it_says_what_became_of_the_run(tmp_path):
    file = StatusFile(str(tmp_path), last_step=5)
    file.after_load(start(3))
    found = []
    for iteration, moment in (
        (3, file.before_training),
        (4, lambda: file.stopped(4, "")),
        (4, lambda: file.stopped(4, "STOP is there")),
        (5, file.finished),
    ):
        file.after_step(step(iteration))
        moment()
        content = json.loads((tmp_path / "status.json").read_text())
        found.append((content["state"], content["step"], content["of"], content["reason"]))
    assert found == [
        ("running", 3, 5, ""),
        ("stopped", 4, 5, "--exit-interval or --exit-duration-in-mins"),
        ("stopped", 4, 5, "STOP is there"),
        ("finished", 5, 5, ""),
    ]


def test_a_run_that_goes_on_may_be_stopped_before_it_has_loaded(tmp_path):
    StatusFile(str(tmp_path), last_step=5).stopped(3, "STOP is there")
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 3
