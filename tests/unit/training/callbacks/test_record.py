"""run.json says what the run is."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_bdpo.training.callbacks.record import RunRecord
from tests.harness.moments import start

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize(("edges", "expected"), [([], None), ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])])
def test_what_it_says(tmp_path, edges, expected):
    asked = []

    def provenance(identity):
        asked.append(identity)
        return {"seed": 7}

    begun = dataclasses.replace(start(), imbalance_edges=edges, log_probs={"train": tmp_path})
    RunRecord(tmp_path, {"train": 40, "heldout": 8}, provenance).after_load(begun)
    assert asked == [begun.identity] and begun.loss.options.beta == 0.1
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "loss": "dpo",
        "loss_options": dataclasses.asdict(begun.loss.options),
        "pairs": {"train": 40, "heldout": 8},
        "reference_scores": {"train": str(tmp_path)},
        "imbalance_quartiles": expected,
        "seed": 7,
    }
