"""Callbacks of a run, one by one; whole runs with them are in tests/distributed and tests/reliability."""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bdpo.errors import UserError
from tests.harness.jobs import own_process


def start(iteration: int = 0) -> Any:
    from megatron_bdpo.training.callbacks.base import Start
    from megatron_bdpo.training.identity import RunIdentity

    return Start([], iteration, None, RunIdentity("", 0, 0, 0, ""), {}, [])


def step(iteration: int) -> Any:
    from megatron_bdpo.training.callbacks.base import StepResult

    return StepResult(iteration, {}, skipped=False, seconds=1.0, pairs=8, tokens=100)


def states(save: Path) -> list[tuple[str, int, str]]:
    """What status.json says after each moment of a run that goes on from step 3."""
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.callbacks.status_file import StatusFile

    with distributed.process_groups(own_process()):
        file = StatusFile(str(save), last_step=5)
        file.after_load(start(3))
        found = []
        for moment in (file.before_training, lambda: file.stopped(""), lambda: file.stopped("STOP"), file.finished):
            moment()
            file.after_step(step(4))
            content = json.loads((save / "status.json").read_text())
            found.append((content["state"], content["step"], content["reason"]))
        return found


def test_the_status_follows_the_run(ranks, tmp_path):
    assert ranks(1)(states, tmp_path) == [
        [
            ("running", 3, ""),
            ("stopped", 4, "--exit-interval or --exit-duration-in-mins"),
            ("stopped", 4, "STOP"),
            ("finished", 4, ""),
        ]
    ]


def gradient_norms(norms: list[float]) -> list[str]:
    from megatron_bdpo.training.callbacks.finite_check import FiniteCheck

    check = FiniteCheck(lambda iteration: [iteration, 7], "pair {}".format)
    said = []
    for iteration, norm in enumerate(norms, 1):
        try:
            check.after_update(norm, iteration)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def test_an_update_that_is_not_finite_is_told_of_with_its_pairs(ranks):
    (said,) = ranks(1)(gradient_norms, [1.0, math.inf, math.nan])
    assert said[0] == ""
    assert "the gradient of step 2 is not finite" in said[1] and "pair 2" in said[1] and "pair 7" in said[1]
    assert "the gradient of step 3 is not finite" in said[2]


def what_is_offered(thing: str) -> str:
    """What a run says of a callback that another package offers."""
    from megatron_bdpo.training.callbacks import standard

    point = importlib.metadata.EntryPoint("theirs", thing, standard.ENTRY_POINT_GROUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard, "entry_points", lambda group: [point])
        try:
            return str(list(standard.of_other_packages(SimpleNamespace(settings=1, job=2))))
        except UserError as error:
            return str(error)


def test_what_another_package_offers_has_to_be_a_callback(ranks):
    call = ranks(1)
    assert "TypeError: it returns a tuple, which is no Callback" in call(what_is_offered, "builtins:divmod")[0]
    (said,) = call(what_is_offered, "nowhere:make")
    assert "an unnamed distribution offers the callback 'theirs' (nowhere:make), but it cannot be used" in said
