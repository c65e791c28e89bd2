"""The router's auxiliary losses: means over the tokens of a step, whatever the pairs and packs, against closed forms.

Their gradient in the last layer's router is what a step with them has more than a step without: at that place, and from
the same weights, everything else is the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.harness.jobs import DATA, TINY_MODEL, train
from tests.harness.ranks import RankFailure
from tests.harness.recording import merge, train_and_record
from tests.parity.matrix import MODELS, VPP2
from tests.parity.test_mutations import auxiliary_loss_weighed_by_own_tokens

EXPERTS, TOP_K, LAST = 4, 2, 3
ROUTER = "decoder.layers.mlp.router.weight"

#: One step of packs that differ in tokens and in padding.
ONE_STEP = {"max_pairs": 7, "pairs_per_step": 7, "train_iters": 1, "pack_pairs": True}

#: fp32, relative to the largest element of the difference of two gradients, which is a tenth of either.
ALLOWED = 1e-4


def routed(flags: list[str], overrides: dict[str, Any], mistake: Any = None) -> tuple[Any, list[np.ndarray]]:
    """This rank's recording, and what the last layer's router has read in training: per pack its tokens, [n, H].

    By pair, per pair of the step instead.
    """
    from megatron_bdpo.model.moe import PairRouter

    inputs: list[np.ndarray] = []
    original = PairRouter.forward
    by_pair = overrides.get("moe_router_load_balancing_type") == "seq_aux_loss"

    def forward(self: Any, hidden: torch.Tensor, padding_mask: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and self.layer_number == LAST + 1:
            tokens = hidden[~padding_mask].detach().double().numpy()
            pairs = self.groups[~padding_mask[:, 0]].numpy() if by_pair else np.zeros(len(tokens))
            inputs.extend(tokens[pairs == pair] for pair in np.unique(pairs))
        return original(self, hidden, padding_mask)

    with mock.patch.object(PairRouter, "forward", forward):
        return train_and_record(flags, mistake=mistake, **overrides), inputs


@pytest.fixture(scope="module")
def gradient_of(ranks, tmp_path_factory):
    """``gradient_of(coefficients)``: (gradient of the last router, its weight, what it has read)."""
    directory = tmp_path_factory.mktemp("experts")

    def gradient_of(mistake: Any = None, **coefficients: Any) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        model = MODELS["experts"].overrides | {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
        job = model | ONE_STEP | {"init_method_std": 0.1, "pair_cache_dir": str(directory)} | coefficients
        ((recording, inputs),) = ranks(1)(routed, [], TINY_MODEL | job, mistake)
        (step,) = merge([recording]).steps
        return step.gradients[ROUTER][LAST], step.weights[ROUTER][LAST], inputs

    return gradient_of


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits.logsumexp(-1).square().sum()


def load_balancing_loss(logits: torch.Tensor) -> torch.Tensor:
    """n E sum_i f_i P_i of a pack of n tokens (Switch, arXiv 2101.03961, equation 4), f_i the share of its choices."""
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K).indices, 1)
    return len(logits) * EXPERTS * (chosen.mean(0) / TOP_K * probabilities.mean(0)).sum()


def load_balancing_loss_of_a_pair(logits: torch.Tensor) -> torch.Tensor:
    """The same, as a mean over the n tokens of a pair."""
    return load_balancing_loss(logits) / len(logits)


def closed_form(loss: Any, weight: np.ndarray, packs: list[np.ndarray]) -> np.ndarray:
    """Gradient in the router's weight of the loss's mean over all tokens, or over all pairs, in fp64."""
    parameter = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    total = sum(loss(torch.from_numpy(pack) @ parameter.T) for pack in packs if len(pack))
    (total / (len(packs) if loss is load_balancing_loss_of_a_pair else sum(map(len, packs)))).backward()
    return parameter.grad.numpy()


BY_PAIR = {"moe_router_load_balancing_type": "seq_aux_loss"}
LOSSES = {
    "z-loss": ({"moe_z_loss_coeff": 0.5}, z_loss, 0.5),
    "load balancing": ({"moe_aux_loss_coeff": 0.5}, load_balancing_loss, 0.5),
    "load balancing by pair": (BY_PAIR | {"moe_aux_loss_coeff": 0.5}, load_balancing_loss_of_a_pair, 0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_auxiliary_loss_is_a_mean_over_tokens(gradient_of, name):
    coefficients, loss, coefficient = LOSSES[name]
    assert deviation(gradient_of, coefficients, loss, coefficient) <= ALLOWED


@pytest.mark.parametrize("over", ["groups", "pairs"])
@pytest.mark.parametrize("name", LOSSES)
def test_auxiliary_loss_of_groups(gradient_of, tmp_path, name, over):
    """Of three answers each, which are three pairs: the same means, whatever the mean of the pairs' losses is over."""
    lines = [json.loads(line) for line in (DATA / "train.jsonl").open()][:8]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": each["prompt"],
                    "responses": [each["chosen"], each["rejected"], other["chosen"]],
                    "scores": [3, 2, 1],
                }
            )
            + "\n"
            for each, other in itertools.pairwise(lines)
        )
    )
    groups = {"pair_data": [str(rows)], "max_pairs": None, "pairs_from": "all", "mean_over": over}
    coefficients, loss, coefficient = LOSSES[name]
    assert deviation(gradient_of, coefficients | groups, loss, coefficient, also=groups) <= ALLOWED


def deviation(gradient_of, coefficients, loss, coefficient, mistake=None, also=MappingProxyType({})) -> float:
    # A coefficient of nothing has routers told of pairs.
    nothing = dict(BY_PAIR | {"moe_aux_loss_coeff": 1e-30} if loss is load_balancing_loss_of_a_pair else {}, **also)
    without, weight, packs = gradient_of(**nothing)
    assert len({len(pack) for pack in packs}) > 1, (
        "packs of one size would not tell means of packs from means of tokens"
    )
    found = gradient_of(mistake, **coefficients)[0] - without
    expected = coefficient * closed_form(loss, weight, packs)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Mistakes that must be caught ----------------------------------------------------------------------------------------


def scaled_as_if_gradients_were_per_token(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training import run

    undo.enter_context(mock.patch.object(run, "_auxiliary_loss_scale", lambda *args: torch.ones(1)))


def padding_counted_as_tokens(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.attention import AttentionPlan

    nothing = property(lambda plan: torch.zeros(plan.positions.numel(), dtype=torch.bool))
    undo.enter_context(mock.patch.object(AttentionPlan, "padding", nothing))


def one_sequence_in_a_pack(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model import moe

    def told(model: Any, router: Any, layer: Any, given: Any, named: dict[str, Any]) -> None:
        router.groups = torch.zeros_like(model.own_positions(named["packed_seq_params"].groups))
        router.group_weight = torch.ones(1)

    undo.enter_context(mock.patch.object(moe, "_tell", told))


CAUGHT = [
    *itertools.product(list(LOSSES)[:2], [scaled_as_if_gradients_were_per_token, padding_counted_as_tokens]),
    ("load balancing by pair", padding_counted_as_tokens),
    ("load balancing by pair", one_sequence_in_a_pack),
]


@pytest.mark.parametrize(("name", "mistake"), CAUGHT)
def test_mistake_is_caught(gradient_of, name, mistake):
    coefficients, loss, coefficient = LOSSES[name]
    assert deviation(gradient_of, coefficients, loss, coefficient, mistake) > 10 * ALLOWED


def gradients_with_an_empty_pack(ranks, directory, mistake=None) -> dict[str, np.ndarray]:
    """Interleaved stages take microbatches in groups: 2 x 2 of them for 3 pairs."""
    job = MODELS["experts"].overrides | {"max_pairs": 3, "pairs_per_step": 3, "train_iters": 1, "seq_length": 2048}
    job |= {"pack_pairs": True}
    flags = [*VPP2.split(), "--no-check-for-nan-in-loss-and-grad"]
    caches = {"pair_cache_dir": str(directory)}
    recordings = ranks(4)(train_and_record, flags, mistake=mistake, **(TINY_MODEL | job | caches))
    return merge(recordings).steps[0].gradients


def test_a_pack_of_nothing_adds_nothing(ranks, tmp_path):
    gradients = gradients_with_an_empty_pack(ranks, tmp_path)
    assert all(layer.any() for layer in gradients[ROUTER])


def test_megatrons_own_router_divides_by_nothing_there(ranks, tmp_path):
    """Else the test above would prove nothing."""
    with pytest.raises(AssertionError, match="not finite"):
        gradients_with_an_empty_pack(ranks, tmp_path, auxiliary_loss_weighed_by_own_tokens)


# Routers that stay as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks_needed", "flags"),
    [(1, []), (2, ["--use-distributed-optimizer"]), (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"])],
)
def test_frozen_routers_have_no_gradients_and_stay(ranks, tmp_path, ranks_needed, flags):
    job = MODELS["experts"].overrides | {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
    job |= {"pair_cache_dir": str(tmp_path), **TINY_MODEL}
    found = merge(ranks(ranks_needed)(train_and_record, [*flags, "--moe-freeze-router"], **job))
    assert ROUTER not in found.steps[0].gradients
    before = found.steps[0].weights
    moved = {name for name, value in found.weights.items() if not np.array_equal(value, before[name])}
    assert before.keys() - moved == {ROUTER}


def test_a_run_goes_on_with_its_routers_as_they_were(ranks, tmp_path):
    job = TINY_MODEL | MODELS["experts"].overrides | {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
    job |= {"pair_cache_dir": str(tmp_path / "cache"), "max_pairs": 16, "train_iters": 2}
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    ranks(1)(train, [*save, "--moe-freeze-router", "--exit-interval", "1"], **job)
    with pytest.raises(RankFailure, match=r"that run froze its routers, .* Add --moe-freeze-router, or"):
        ranks(1)(train, [*save, "--load", str(tmp_path / "run")], **job)
    (outcome,) = ranks(1)(train, [*save, "--load", str(tmp_path / "run"), "--moe-freeze-router"], **job)
    assert [step["iteration"] for step in outcome.steps] == [2]
