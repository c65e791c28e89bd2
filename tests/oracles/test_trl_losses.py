"""The losses of TRL's trainers on log-probs of our choice: value and gradient of every loss that both have.

TRL's own code computes them, from a model whose output is given. What the whole trainer does is in `test_trl.py`; how
far they are apart is measured by `tools/loss_errors.py`.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bdpo import losses
from tests.harness.trl_losses import COUNTERPARTS, PAIRS, apart, cpo_trainer, dpo_trainer, kto_trainer, log_probs, ours

trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason="the oracle is TRL's DPOTrainer")

OF_DPO_TRAINER = {name: each for name, each in COUNTERPARTS.items() if each.trainer is dpo_trainer}

#: Losses that TRL takes another divergence with (``DPOConfig.f_divergence_type``), but SFT, which has no use for it.
OF_DIFFERENCE = ("dpo", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")

DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js_divergence"},
    {"f_divergence": "alpha_divergence"},
    {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
    {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]

#: Sums of float64 in another order; what TRL computes in float32 whatever its inputs.
EXACT, SINGLE = 1e-13, 1e-6
#: All in float32: some roundings of 6e-8.
ROUNDED = 2e-6


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", COUNTERPARTS)
def test_value_and_gradient(name, tokens):
    theirs = COUNTERPARTS[name]
    found = apart(partial(ours, name, theirs.of_ours, tokens), partial(theirs.loss, tokens), log_probs)
    assert found < (SINGLE if theirs.in_single else EXACT)


@pytest.mark.parametrize("name", sorted(OF_DPO_TRAINER.keys() - {"sft", "hinge", "aot", "aot_unpaired"}))
def test_weighting(name):
    """But SFT, where TRL weighs each pair's share of the mean over all; hinge, on which its backward fails; and AOT,
    whose sorted losses it weighs as if they were in the pairs' order."""
    entropies = 4 * torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = COUNTERPARTS[name]
    own = partial(ours, name, theirs.of_ours, 3, collision_entropies=entropies)
    found = apart(own, partial(theirs.loss, 3, collision_entropies=entropies), log_probs)
    assert found < (SINGLE if theirs.in_single else EXACT)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_divergence(name, divergence):
    """In float32, which is all that TRL's alpha divergence takes; near the reference, where its DiscoPOP is finite."""
    theirs = COUNTERPARTS[name]
    own = partial(ours, name, theirs.of_ours | divergence, 1)
    assert apart(own, partial(theirs.loss, 1, **divergence), partial(log_probs, torch.float32, -2.0)) < ROUNDED


def test_alpha_divergence_is_cut_where_trl_cuts_it():
    given = {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.2}
    values = log_probs(torch.float32)
    assert (0.8 * 30 * (values[2] - values[0]) > 80).any() and (0.8 * 30 * (values[3] - values[1]) > 80).any()
    theirs = partial(dpo_trainer, "sigmoid", 30, **given)
    found = apart(partial(ours, "dpo", given, 30), theirs, partial(log_probs, torch.float32))
    assert found < 3e-5, "exponents up to 80, with roundings of 5e-6 each"


def test_which_losses_of_trl_take_a_divergence():
    """Ours are those, and one more that TRL does not have."""
    source = inspect.getsource(trl_dpo.DPOTrainer._compute_loss)
    parts = re.split(r'loss_type == "(\w+)"', source)
    theirs = {name for name, body in zip(parts[1::2], parts[2::2], strict=True) if re.search("_scores?\\b", body)}
    assert theirs == {COUNTERPARTS[name].kind for name in OF_DIFFERENCE}
    assert set(losses.option_fields()["f_divergence"].defaults) == {*OF_DIFFERENCE, "safedpo"}


def test_mix():
    """MPO's, which is TRL's own example of `loss_weights`."""
    theirs = partial(dpo_trainer, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 3)
    assert apart(partial(ours, "dpo=0.8,bco_pair=0.2,sft=1.0", {}, 3), theirs, log_probs) < EXACT


def test_every_loss_of_trl_is_compared():
    source = Path(trl_dpo.__file__).read_text("utf-8")
    known = set(re.findall(r'loss_type == "(\w+)"', source))
    assert known == {each.kind for each in OF_DPO_TRAINER.values()}


def test_every_loss_of_its_kto_trainer_is_compared():
    from trl import KTOConfig

    choices = KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"]
    assert set(choices) == {each.kind for each in COUNTERPARTS.values() if each.trainer is kto_trainer}


def test_alphapo_below_zero():
    own = partial(ours, "alphapo", COUNTERPARTS["alphapo"].of_ours | {"alphapo_alpha": -0.5}, 1)
    assert apart(own, partial(cpo_trainer, "simpo", 1, alpha=-0.5), log_probs) < EXACT


def test_a_mistake_is_seen():
    theirs = replace(COUNTERPARTS["dpo"], kind="hinge")
    assert apart(partial(ours, "dpo", {}, 1), partial(theirs.loss, 1), log_probs) > 0.1
