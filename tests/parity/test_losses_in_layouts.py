"""Every loss takes the same steps in a layout as on one process: whatever it reads comes from the right rank."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from megatron_bdpo.losses import registry
from tests.harness.jobs import DATA
from tests.harness.parity import beyond, deviations
from tests.harness.ranks import RankFailure
from tests.parity.matrix import ALLOWED, CP2, MODELS, PP2, TP2
from tests.parity.test_groups import job, pairs_of, rows

LAYOUTS = {"TP2 PP2": f"{TP2} {PP2}", "TP2 CP2": f"{TP2} {CP2}", "PP2 CP2": f"{PP2} {CP2}"}

#: The matrix has three; safedpo reads labels, which these pairs do not have; dpop's gradient jumps where the first step
#: is, so that rounding decides (`losses.dpop`): its closed form is compared, its layouts cannot be.
ELSEWHERE = {"bdpo", "dpo", "simpo", "safedpo", "dpop"}

#: With options that many losses have.
MODIFIED = {
    "dpo, Jensen-Shannon": ["--preference-loss", "dpo", "--f-divergence", "js_divergence"],
    "dpo, weighted": ["--preference-loss", "dpo", "--use-weighting"],
    "dpo, no reference": ["--preference-loss", "dpo", "--reference-free"],
    "dpo, of common lengths": ["--preference-loss", "dpo", "--ld-alpha", "0.5"],
}

#: Of rows with several answers, and with one: see ``test_groups`` and ``test_labelled_answers``.
OTHERS = {spec.name for spec in registry.all_specs() if spec.takes != "pairs"}

LOSSES = [*sorted(set(registry.names()) - ELSEWHERE - OTHERS), "bdpo=1.0,sft=0.2,bco_pair=0.5", *MODIFIED]

#: Where a loss as it is by default makes more of the log-probs' rounding than the matrix allows: gradients are 200
#: times DPO's, so Adam's epsilon is too; or slopes change by 1 / tau.
CONDITIONED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sppo_hard": ([], {"adam_eps": 2.0}),
    "discopop": (["--discopop-tau", "1"], {}),
}


#: Of losses whose pairs hang on others of the step: on other ranks, in other microbatches.
OF_STEPS = [spec.name for spec in registry.all_specs() if spec.step_targets]
DATA_PARALLEL = {"DP4": "", "PP2 DP2": PP2}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Flags and overrides of a job whose reference orders the pairs otherwise than the policy: the rows bring it."""
    path, generator = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random.Random(0)
    pairs = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[:24]]
    for pair in pairs:
        pair |= {f"ref_{name}_logps": -generator.uniform(50, 500) for name in ("chosen", "rejected")}
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    overrides = MODELS["dense"].overrides | {"pair_data": (str(path),)}
    return ["--reference", "columns", "--no-step-zero-check"], overrides


@pytest.mark.parametrize("layout", DATA_PARALLEL)
@pytest.mark.parametrize("loss", OF_STEPS)
def test_a_step_is_looked_at_across_ranks(run, one_process, foreign, loss, layout):
    flags, overrides = [*foreign[0], "--preference-loss", loss], foreign[1]
    found = run(4, [*DATA_PARALLEL[layout].split(), *flags], overrides)
    assert beyond(deviations(found, one_process(flags, overrides)), ALLOWED) == {}


@pytest.mark.parametrize("loss", OF_STEPS)
def test_a_step_is_looked_at_beside_a_resident_reference(run, one_process, loss):
    flags, overrides = ["--preference-loss", loss], MODELS["dense"].overrides
    found = run(2, [*CP2.split(), *flags, "--reference", "resident"], overrides)
    assert beyond(deviations(found, one_process(flags, overrides)), ALLOWED) == {}


def test_pairs_of_groups_are_sorted_as_pairs_are(run, one_process, tmp_path):
    made = [pair for row in rows() for pair in pairs_of(row)]
    flags, overrides = job(tmp_path / "pairs.jsonl", made, preference_loss="aot")
    of_groups, together = job(tmp_path / "groups.jsonl", rows(), pairs_from="all", preference_loss="aot")
    found = run(2, [*of_groups, "--mean-over", "pairs"], together)
    assert beyond(deviations(found, one_process(flags, overrides)), ALLOWED) == {}


def test_sorted_pairs_count_alike(run, tmp_path):
    flags, overrides = job(tmp_path / "groups.jsonl", rows(), pairs_from="all", preference_loss="aot")
    with pytest.raises(RankFailure, match="sorts a step's pairs, each of which is to count alike"):
        run(1, flags, overrides)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_in_a_layout(run, one_process, loss, layout):
    options, own = CONDITIONED.get(loss, ([], {}))
    flags = [*MODIFIED.get(loss, ["--preference-loss", loss]), *options]
    overrides = MODELS["dense"].overrides | own
    found = run(4, [*LAYOUTS[layout].split(), *flags], overrides)
    assert beyond(deviations(found, one_process(flags, overrides)), ALLOWED) == {}
