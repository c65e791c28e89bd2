"""Every loss of labelled answers against a plain-Python fp64 closed form, and what does not matter to it."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import fields, replace

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import AnswerLogProbs, AnswerLosses, PairLogProbs, Requirements
from megatron_bdpo.losses.answers import answer_report
from tests.harness.answer_forms import (
    ANSWER_CASES,
    ANSWER_FORMS,
    EXTREME,
    WEIGHTED,
    Answer,
    evaluate,
    expected,
    inputs,
    random_answers,
    shift_of,
)

OF_ANSWERS = sorted(spec.name for spec in losses.all_specs() if spec.takes == "answers")
OF_STEPS = [name for name in OF_ANSWERS if losses.get(name).step_shift]

ANSWERS = random_answers(100) + EXTREME
#: What the loss's step may be: the answers, those whose drift is negative, so that z is 0, and none.
STEPS = {"itself": ANSWERS, "sinking": random_answers(50, seed=2, drift=-1.0), "none": []}

every_case = pytest.mark.parametrize(("name", "given"), ANSWER_CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

# Log-ratios reach 1e4 and round at 1e4 eps; times beta that is the absolute error of a reward, and so the relative
# error of sigmoid far from 0: 5e3 eps.
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-13}, torch.float32: {"rtol": 1e-3, "atol": 1e-5}}


@every_dtype
@pytest.mark.parametrize("step", STEPS)
@every_case
def test_loss_and_gradient_match_the_closed_form(name, given, step, dtype):
    rows = torch.tensor(expected(name, given, ANSWERS, STEPS[step]), dtype=torch.float64)
    loss, gradient, out = evaluate(losses.get(name), given, ANSWERS, STEPS[step], dtype)
    torch.testing.assert_close(torch.stack([loss, gradient], 1).double(), rows, **TOLERANCE[dtype])
    beta = given.get("beta", 0.1)
    expected_reward = torch.tensor([beta * (a.l - a.r) for a in ANSWERS], dtype=torch.float64)
    torch.testing.assert_close(out.reward.double(), expected_reward, rtol=1e-6, atol=0)
    told = (loss, gradient, out.reward, *out.metrics.values())
    assert {(value.dtype, value.shape) for value in told} == {(dtype, (len(ANSWERS),))}


def test_every_loss_of_answers_is_here():
    assert sorted(ANSWER_FORMS) == OF_ANSWERS


@every_case
def test_gradcheck(name, given):
    spec, options = losses.get(name), losses.build_options(name, given)
    answers = random_answers(12, seed=3)
    full = replace(inputs(answers, torch.float64), shift=shift_of(spec, answers, options, torch.float64))
    function = spec.function
    assert torch.autograd.gradcheck(lambda policy: function(replace(full, policy=policy), options).loss, full.policy)


@pytest.mark.parametrize("name", OF_STEPS)
def test_the_shift_is_one_number_without_a_gradient(name):
    spec, options = losses.get(name), losses.build_options(name, {})
    for dtype in (torch.float64, torch.float32):
        with_gradient = inputs(ANSWERS, dtype)
        shift = spec.step_shift(with_gradient, options)
        assert shift.shape == () and shift.dtype == dtype and not shift.requires_grad


@every_case
def test_inputs_stay_and_only_the_loss_carries_a_gradient(name, given):
    spec, options = losses.get(name), losses.build_options(name, given)
    shift = torch.tensor(0.5)
    answers, before = (replace(inputs(ANSWERS, torch.float32), shift=shift) for _ in range(2))
    out = spec.function(answers, options)
    for each in fields(AnswerLogProbs):
        assert torch.equal(getattr(answers, each.name), getattr(before, each.name))
    assert out.loss.requires_grad and not any(value.requires_grad for value in (out.reward, *out.metrics.values()))


@pytest.mark.parametrize("step", STEPS)
@every_case
def test_no_answers(name, given, step):
    """Of a microbatch without any."""
    loss, gradient, out = evaluate(losses.get(name), given, [], STEPS[step])
    assert {value.shape for value in (loss, gradient, out.reward, *out.metrics.values())} == {(0,)}


# --- what does not matter ---


@every_case
def test_neither_order_nor_microbatches_matter(name, given):
    """To the bit: of the step every answer sees one number, and that is the same."""
    spec, (loss, gradient, out) = losses.get(name), evaluate(losses.get(name), given, ANSWERS, ANSWERS, torch.float32)
    for seed in range(5):
        order = random.Random(seed).sample(range(len(ANSWERS)), len(ANSWERS))
        moved, step = [ANSWERS[i] for i in order], [ANSWERS[i] for i in reversed(order)]
        start = 0
        for size in (1, 32, len(ANSWERS) - 33):
            some, places = moved[start : start + size], order[start : start + size]
            found, slope, told = evaluate(spec, given, some, step, torch.float32)
            # torch's vector kernels on a CPU have another last bit at the ends of arrays.
            torch.testing.assert_close(found, loss[places], rtol=1e-6, atol=0)
            torch.testing.assert_close(slope, gradient[places], rtol=1e-6, atol=0)
            assert all(torch.equal(value, out.metrics[key][places]) for key, value in told.metrics.items())
            start += size


def test_some_of_the_answers_are_of_the_same_step():
    answers = replace(inputs(ANSWERS, torch.float64), shift=torch.tensor(0.25, dtype=torch.float64))
    for some in (slice(3, 9), answers.desirable):
        part = answers[some]
        assert part.shift is answers.shift and torch.equal(part.policy, answers.policy[some])
        assert len(part) == len(answers.policy[some]) and torch.equal(part.reference, answers.reference[some])
    assert replace(answers, reference=None)[:2].reference is None


# --- extreme values ---


@every_dtype
@pytest.mark.parametrize("beta", [1e-3, 1e4])
@pytest.mark.parametrize("name", OF_ANSWERS)
def test_extreme_values_stay_finite(name, beta, dtype):
    values = (-1e30, -1e-30, -1.0)
    large = [Answer(x, 1, label, y, y, x) for x, y in itertools.product(values, repeat=2) for label in (True, False)]
    for step in (large, []):
        loss, gradient, out = evaluate(losses.get(name), {"beta": beta}, large, step, dtype)
        assert all(value.isfinite().all() for value in (loss, gradient, out.reward, *out.metrics.values()))


# --- what they are ---


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_only_the_own_labels_weight_counts(name):
    loss, gradient, _ = evaluate(losses.get(name), {}, ANSWERS, ANSWERS)
    heavy, steep, _ = evaluate(losses.get(name), {"desirable_weight": 3.0}, ANSWERS, ANSWERS)
    factor = torch.tensor([3.0 if a.d else 1.0 for a in ANSWERS], dtype=torch.float64)
    torch.testing.assert_close(heavy, factor * loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(steep, factor * gradient, rtol=1e-14, atol=0)


def test_apo_zero_unpaired_is_kto_without_a_step():
    expected_loss, expected_gradient, _ = evaluate(losses.get("kto"), WEIGHTED, ANSWERS, [])
    loss, gradient, _ = evaluate(losses.get("apo_zero_unpaired"), WEIGHTED, ANSWERS, ANSWERS)
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(("name", "of_pairs"), [("apo_zero_unpaired", "apo_zero"), ("bco", "bco_pair")])
def test_of_a_pair_they_add_up_to_the_loss_of_pairs(name, of_pairs):
    """Where no step is looked at."""
    chosen = [a._replace(d=True) for a in random_answers(64, seed=1)]
    rejected = [a._replace(d=False) for a in random_answers(64, seed=2)]
    columns = [inputs(each, torch.float64) for each in (chosen, rejected)]
    pairs = PairLogProbs(
        *(each.policy for each in columns), *(each.tokens for each in columns), *(each.reference for each in columns)
    )
    expected_loss = losses.get(of_pairs).function(pairs, losses.build_options(of_pairs, {})).loss
    loss = sum(evaluate(losses.get(name), {}, each, [])[0] for each in (chosen, rejected))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-14, atol=1e-15)


def test_metrics_tell_what_was_found():
    step = random_answers(40, seed=4)
    drift = sum(a.m - a.q for a in step) / len(step)
    mean = sum(a.l - a.r for a in step) / len(step)
    assert drift > 0
    for name, key, value in (("kto", "kl", drift), ("bco", "delta", 0.5 * mean)):
        _, _, out = evaluate(losses.get(name), {"beta": 0.5}, ANSWERS, step)
        assert out.metrics.keys() == {key} and out.metrics[key].tolist() == pytest.approx([value] * len(ANSWERS))
        assert evaluate(losses.get(name), {}, ANSWERS, [])[2].metrics == {}


def test_the_report():
    """On its label's side of the shift, on the other, and on neither."""
    desirable = torch.tensor([True, True, False, False, True, False])
    reward = torch.tensor([2.0, 0.5, 0.5, 2.0, 1.0, 1.0 + 5e-6])
    tokens = torch.ones(6, dtype=torch.int64)
    answers = AnswerLogProbs(reward, tokens, desirable, shift=torch.tensor(1.0))
    found = answer_report(answers, AnswerLosses(reward, reward))
    assert found.accuracy.tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]
    assert found.margin.tolist() == pytest.approx([1.0, -0.5, 0.5, -1.0, 0.0, 0.0], abs=1e-5)
    unshifted = answer_report(replace(answers, shift=None), AnswerLosses(reward, reward))
    assert unshifted.accuracy.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "expected_requirements", "looks"),
    [
        ("apo_zero_unpaired", Requirements(reference=True), False),
        ("bco", Requirements(reference=True), True),
        ("kto", Requirements(reference=True, mismatched=True), True),
    ],
)
def test_what_they_say_of_themselves(name, expected_requirements, looks):
    spec = losses.get(name)
    assert spec.requirements(spec.options()) == expected_requirements
    assert (spec.step_shift is not None) is looks and spec.takes == "answers"
    assert {each.name for each in fields(spec.options)} == {"beta", "desirable_weight", "undesirable_weight"}


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_no_mix_takes_them(name):
    with pytest.raises(UserError, match=f"'{name}' is a loss of labelled answers, each by itself"):
        losses.get(f"dpo=1,{name}=0.5")


# --- advice ---


@pytest.mark.parametrize("name", ["apo_zero_unpaired", "kto"])
@pytest.mark.parametrize(
    ("desirable", "undesirable", "given", "advised"),
    [
        (100, 100, {}, ""),
        (400, 300, {}, ""),
        (999, 1000, {}, ""),
        (135, 100, {}, "1.35 times .*Set --undesirable-weight between 1.01 and 1.35"),
        (100, 400, {}, "0.25 times .*100 x 1, 400 x 1.*Set --desirable-weight between 4 and 5.33"),
        (100, 400, {"desirable_weight": 4.0}, ""),
        (100, 400, {"undesirable_weight": 0.25}, ""),
        (400, 100, {}, "4 times .*Set --undesirable-weight between 3 and 4"),
        (400, 100, {"undesirable_weight": 5.0}, "0.8 times .*Set --desirable-weight between 1.25 and 1.67"),
        (7, 0, {}, "all answers are desirable: this loss tells them from undesirable ones"),
        (0, 7, {}, "all answers are undesirable: this loss tells them from desirable ones"),
    ],
)
def test_advice_about_labels(name, desirable, undesirable, given, advised):
    spec, options = losses.get(name), losses.build_options(name, given)
    found = spec.advise(desirable, undesirable, options)
    if not advised:
        assert found is None
        return
    assert re.search(advised, found) and found.endswith(".")
