"""TRL's CPOTrainer and ORPOTrainer take the same step on the same pairs: see ``test_trl``."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import FAMILIES, VOCABULARY, build_model, to_hugging_face
from tests.harness.jobs import TINY_MODEL
from tests.harness.recording import merge, train_and_record
from tests.harness.trl_trainer import apart, token_id_tokenizer, trl_step_without_reference
from tests.oracles.test_trl import CP2, GRADIENT, TP2_PP2, TRL_ROUNDING, pairs_as_text

pytest.importorskip("trl", reason="the oracles are TRL's CPOTrainer and ORPOTrainer")
pytestmark = pytest.mark.filterwarnings("ignore")  # experimental, they say

PAIRS = 6

#: Our flags, TRL's settings, ranks and layout.
CASES = {
    "cpo": ("--beta 0.3 --nll-weight 0.5", {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.5}, TP2_PP2),
    "simpo": (
        "--beta 2 --simpo-gamma 0.7 --nll-weight 0.2",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.2},
        CP2,
    ),
    "alphapo": (
        "--beta 2 --simpo-gamma 0.5 --alphapo-alpha 0.1",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "alpha": 0.1, "cpo_alpha": 0.0},
        TP2_PP2,
    ),
    "orpo": ("--orpo-weight 0.4", {"beta": 0.4}, CP2),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_rewards_and_gradients(request, ranks, tmp_path, name):
    flags, settings, (world_size, layout) = CASES[name]
    model = TINY_MODEL | FAMILIES["llama"]
    job = {"max_pairs": 2 * PAIRS, "pairs_per_step": PAIRS, "train_iters": 2, "init_method_std": 0.2, "lr": 1e-2}
    flags = ["--preference-loss", name, *flags.split(), *layout]
    step = merge(ranks(world_size)(train_and_record, flags, pair_cache_dir=str(tmp_path), **model, **job)).steps[1]
    (meta,) = tmp_path.glob("*/meta.json")
    expected, in_single = (
        trl_step_without_reference(
            build_model("llama", model, step.weights),
            pairs_as_text(PairStore.open(meta.parent), list(step.tokens)),
            token_id_tokenizer(VOCABULARY),
            tmp_path,
            double=double,
            **settings,
        )
        for double in (True, False)
    )
    for each in ("loss", "rewards/margins", "rewards/accuracies"):
        assert step.metrics[each] == pytest.approx(expected.metrics[each], rel=1e-5), each
    for weight, theirs in expected.gradients.items():
        assert np.abs(theirs).max() > 1e-3, f"{weight}: a gradient that is nearly zero compares nothing"
    gradients = to_hugging_face("llama", step.gradients, model)
    found = [apart(each, expected.gradients) for each in (gradients, in_single.gradients)]
    print(f"{request.node.name}: from TRL in fp64: ours {found[0]}, TRL in fp32 {found[1]}")
    assert found[0][0] <= GRADIENT and found[1][0] <= TRL_ROUNDING
