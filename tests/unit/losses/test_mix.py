"""Weighted sums of losses: the sum of what their terms are alone, with one option of a name for all."""

from __future__ import annotations

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import Requirements
from tests.harness.loss_cases import PAIRS, evaluate, inputs

MPO = "bdpo=1.0,sft=0.2,bco_pair=0.5"


@pytest.mark.parametrize("given", [{}, {"beta": 0.3, "bdpo_temperature": 0.5}], ids=str)
def test_the_sum_of_its_terms(given):
    found, out = evaluate(MPO, given, inputs(PAIRS, torch.float64))
    alone = {
        "bdpo": (1.0, given),
        "sft": (0.2, {}),
        "bco_pair": (0.5, {key: value for key, value in given.items() if key == "beta"}),
    }
    terms = {name: (w, *evaluate(name, own, inputs(PAIRS, torch.float64))) for name, (w, own) in alone.items()}
    for part in ("loss", "grad_w", "grad_l"):
        expected = sum(weight * getattr(result, part) for weight, result, _ in terms.values())
        torch.testing.assert_close(getattr(found, part), expected, rtol=1e-14, atol=1e-14)
    for name, (weight, result, own) in terms.items():
        torch.testing.assert_close(out.metrics[f"loss/{name}"], weight * result.loss.detach())
        for key, value in own.metrics.items():
            assert torch.equal(out.metrics[key], value)
    assert torch.equal(out.chosen_reward, terms["bdpo"][2].chosen_reward)


def test_defaults_that_differ_stay_each_terms_own():
    function, options = losses.get("dpo=1,simpo=2").function, losses.build_options("dpo=1,simpo=2", {})
    found = function(inputs(PAIRS, torch.float64), options).loss
    dpo, simpo = (evaluate(name, {}, inputs(PAIRS, torch.float64))[0].loss for name in ("dpo", "simpo"))
    torch.testing.assert_close(found, dpo + 2 * simpo, rtol=1e-14, atol=0)
    given = losses.build_options("dpo=1,simpo=2", {"beta": 0.7})
    found = function(inputs(PAIRS, torch.float64), given).loss
    dpo, simpo = (evaluate(name, {"beta": 0.7}, inputs(PAIRS, torch.float64))[0].loss for name in ("dpo", "simpo"))
    torch.testing.assert_close(found, dpo + 2 * simpo, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (MPO, Requirements(reference=True, comprehension=True)),
        ("sft=1,cpo=1", Requirements()),
        ("simpo=1,dpo=1", Requirements(reference=True, length_normalised=True)),
    ],
)
def test_requirements_are_those_of_any_term(name, expected):
    assert losses.get(name).requirements(losses.build_options(name, {})) == expected


def test_one_term_may_sort_the_pairs_of_a_step():
    name, given = "aot=1.0,sft=0.5", {"beta": 0.3}
    found, _ = evaluate(name, given, inputs(PAIRS, torch.float64))
    aot, _ = evaluate("aot", given, inputs(PAIRS, torch.float64))
    sft, _ = evaluate("sft", {}, inputs(PAIRS, torch.float64))
    torch.testing.assert_close(found.loss, aot.loss + 0.5 * sft.loss, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.grad_w, aot.grad_w + 0.5 * sft.grad_w, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("aot=1,aot_unpaired=1", {}, "more than one term sorts the pairs of a step. Keep one."),
        ("dpo,sft=1", {}, "'dpo' has no weight above 0"),
        ("dpo=x", {}, "'dpo=x' has no weight above 0"),
        ("dpo=0,sft=1", {}, "'dpo=0' has no weight above 0"),
        ("dpo=nan,sft=1", {}, "'dpo=nan' has no weight above 0"),
        ("dpo=1,", {}, "'' has no weight above 0"),
        ("dpo=1,dpo=2", {}, "a loss comes twice"),
        ("dop=1,sft=1", {}, "unknown loss 'dop'; did you mean 'dpop'"),
        ("safedpo=1,sft=1", {}, "'safedpo' swaps and drops pairs"),
        (MPO, {"nll_weight": 0.1}, "--nll-weight is not used by the loss 'bdpo=1.0"),
        (MPO, {"simpo_gamma": 0.1}, "--simpo-gamma is not used by the loss 'bdpo=1.0"),
        (MPO, {"bdpo_temperature": "auto"}, "--bdpo-temperature must be of type float"),
        (MPO, {"beta": -1.0}, "--beta must be"),
    ],
)
def test_what_is_refused(name, given, expected):
    with pytest.raises(UserError) as caught:
        losses.build_options(name, given)
    assert expected in str(caught.value)
