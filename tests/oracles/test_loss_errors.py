"""The errors of losses that the documentation tells are what is measured."""

from __future__ import annotations

import json
import math

import pytest

from megatron_bdpo import losses
from tests.harness.answer_forms import ANSWER_FORMS
from tests.harness.closed_forms import CLOSED_FORMS, STEP_FORMS
from tests.harness.group_forms import GROUP_FORMS
from tools import loss_errors

pytest.importorskip("trl.trainer.dpo_trainer", reason="an oracle is TRL's DPOTrainer")

#: Roundings differ between processors and versions of torch; another digit would be a mistake.
TIMES, LEAST = 10, 1e-15


def test_errors_are_as_told():
    told, found = json.loads(loss_errors.FILE.read_text("utf-8")), loss_errors.measured()
    assert told["trl"] == found["trl"], "python tools/loss_errors.py, make pages"
    for part in ("losses", "options"):
        assert told[part].keys() == found[part].keys(), "python tools/loss_errors.py, make pages"
        for name, errors in found[part].items():
            assert errors.keys() == told[part][name].keys(), name
            for title, error in errors.items():
                expected = told[part][name][title]
                if isinstance(error, str):
                    assert error == expected, name
                else:
                    assert error <= TIMES * expected + LEAST, (name, title)
                    assert title == "fp32" or expected <= TIMES * error + LEAST, (name, title)


def test_every_loss_has_an_oracle():
    closed_forms = CLOSED_FORMS.keys() | STEP_FORMS.keys() | GROUP_FORMS.keys() | ANSWER_FORMS.keys()
    assert set(losses.names()) == closed_forms


@pytest.mark.parametrize(
    ("error", "expected"), [(0.0, 0.0), (1e-16, 1e-16), (1.01e-16, 2e-16), (9.5e-8, 1e-7), (3.0, 3.0), (math.pi, 4.0)]
)
def test_rounded_up(error, expected):
    assert loss_errors.rounded_up(error) == pytest.approx(expected, rel=1e-12)
