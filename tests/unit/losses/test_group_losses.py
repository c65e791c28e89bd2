"""Every loss of groups against a plain-Python fp64 closed form, and what does not matter to it: order and padding."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import asdict, fields, replace

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import GroupLogProbs, Requirements
from megatron_bdpo.losses.options import field_types, flag
from tests.harness.group_cases import EXTREME, GROUPS, evaluate, inputs, random_groups, told
from tests.harness.group_forms import GROUP_CASES, GROUP_FORMS, Answer, expected_rewards, with_nll

OF_GROUPS = sorted(spec.name for spec in losses.all_specs() if spec.takes == "groups")

every_case = pytest.mark.parametrize(("name", "given"), GROUP_CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

# Log-ratios reach 1e4 and round at 1e4 eps; times beta that is the absolute error of a margin, and so the relative
# error of sigmoid far from 0: 1e3 eps, of sums over ten pairs 1e4 eps. Gains of scores reach 2^4.5.
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-11}, torch.float32: {"rtol": 2e-3, "atol": 3e-5}}


@every_dtype
@every_case
def test_loss_and_gradient_match_the_closed_form(name, given, dtype):
    options = asdict(losses.build_options(name, given))
    nll_weight = options.pop("nll_weight")
    rows = [with_nll(group, GROUP_FORMS[name](group, **options), nll_weight) for group in GROUPS]
    places = max(map(len, GROUPS))
    expected_loss = torch.tensor([loss for loss, _ in rows], dtype=torch.float64)
    expected_gradient = torch.tensor(
        [[*slopes, *[0.0] * (places - len(slopes))] for _, slopes in rows], dtype=torch.float64
    )

    actual, out = evaluate(name, given, inputs(GROUPS, dtype))

    torch.testing.assert_close(actual.loss.double(), expected_loss, **TOLERANCE[dtype])
    torch.testing.assert_close(actual.gradient.double(), expected_gradient, **TOLERANCE[dtype])
    assert actual.loss.shape == (len(GROUPS),) and out.reward.shape == (len(GROUPS), places)
    assert {value.dtype for value in (*actual, *told(out).values())} == {dtype}
    assert {value.shape for value in out.metrics.values()} <= {(len(GROUPS),)}
    expected_reward = expected_rewards(name, GROUPS[0], options)
    assert out.reward[0, : len(GROUPS[0])].tolist() == pytest.approx(expected_reward, rel=1e-6)


def test_every_loss_of_groups_is_here():
    assert sorted(GROUP_FORMS) == OF_GROUPS


@every_case
def test_gradcheck(name, given):
    """Where no two rewards are equal: there lipo_lambda's weights jump."""
    full = inputs(random_groups(6, seed=3), torch.float64)
    function, options = losses.get(name).function, losses.build_options(name, given)
    assert torch.autograd.gradcheck(lambda policy: function(replace(full, policy=policy), options).loss, full.policy)


@every_case
def test_inputs_stay_and_only_the_loss_carries_a_gradient(name, given):
    groups, expected_groups = inputs(GROUPS, torch.float32, absent=3.0), inputs(GROUPS, torch.float32, absent=3.0)
    _, out = evaluate(name, given, groups)
    for each in fields(GroupLogProbs):
        assert torch.equal(getattr(groups, each.name), getattr(expected_groups, each.name))
    assert not any(value.requires_grad for value in told(out).values())


@every_case
def test_no_groups(name, given):
    actual, out = evaluate(name, given, inputs([], torch.float32, places=4))
    assert {value.shape for value in (actual.loss, *out.metrics.values())} == {(0,)}
    assert out.reward.shape == actual.gradient.shape == (0, 4)


# --- what does not matter ---


@every_case
def test_the_order_of_answers_does_not_matter(name, given):
    expected, expected_out = evaluate(name, given, inputs(GROUPS, torch.float64))
    for seed in range(5):
        order = [random.Random(seed).sample(range(len(group)), len(group)) for group in GROUPS]
        moved = [[group[i] for i in places] for group, places in zip(GROUPS, order, strict=True)]
        actual, out = evaluate(name, given, inputs(moved, torch.float64))
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=1e-12)
        for key, value in out.metrics.items():
            torch.testing.assert_close(value, expected_out.metrics[key], rtol=1e-12, atol=1e-12)
        for row, places in enumerate(order):
            for values, wanted in ((actual.gradient, expected.gradient), (out.reward, expected_out.reward)):
                torch.testing.assert_close(values[row, : len(places)], wanted[row, places], rtol=1e-12, atol=1e-12)


@every_dtype
@pytest.mark.parametrize("absent", [1e30, -1e30, 7.0])
@every_case
def test_what_stands_where_no_answer_is_does_not_matter(name, given, absent, dtype):
    expected, expected_out = evaluate(name, given, inputs(GROUPS, dtype, places=7))
    actual, out = evaluate(name, given, inputs(GROUPS, dtype, places=7, absent=absent))
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.gradient, expected.gradient)
    for key, value in told(out).items():
        assert torch.equal(value, told(expected_out)[key]), key
    nowhere = ~inputs(GROUPS, dtype, places=7).present
    assert not actual.gradient[nowhere].any() and not out.reward[nowhere].any()


@every_case
def test_a_group_alone_is_the_group_among_larger_ones(name, given):
    expected, expected_out = evaluate(name, given, inputs(GROUPS, torch.float64, places=8))
    for row in (*range(8), *range(len(GROUPS) - len(EXTREME), len(GROUPS))):
        k = len(GROUPS[row])
        actual, out = evaluate(name, given, inputs([GROUPS[row]], torch.float64))
        torch.testing.assert_close(actual.loss[0], expected.loss[row], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(actual.gradient[0], expected.gradient[row, :k], rtol=1e-12, atol=1e-13)
        for key, value in out.metrics.items():
            torch.testing.assert_close(value[0], expected_out.metrics[key][row], rtol=1e-13, atol=1e-13)


# --- extreme values ---


@every_dtype
@pytest.mark.parametrize("beta", [1e-3, 1e4])
@every_case
def test_extreme_values_stay_finite(name, given, beta, dtype):
    high = 1e36 if given.get("lipo_labels") != "score" else 10.0  # of scores themselves the gain is 2^score
    large = [
        [Answer(x, 1, high, y, z), Answer(y, 1, -high, z, x), Answer(z, 1, 0.0, x, y), Answer(x, 1, 0.0, x, x)]
        for x, y, z in itertools.permutations((-1e30, -1e-30, -1.0))
    ]
    actual, out = evaluate(name, {**given, "beta": beta}, inputs(large, dtype, places=6, absent=-1e30))
    assert all(value.isfinite().all() for value in (*actual, *told(out).values()))


# --- ties ---

COMPARING = [
    (name, given)
    for name, given in GROUP_CASES
    if name not in ("infonca", "nca") and not losses.build_options(name, given).nll_weight
]


@pytest.mark.parametrize(("name", "given"), COMPARING, ids=str)
def test_answers_of_equal_score_are_not_compared(name, given):
    tied = [[a._replace(score=2.0) for a in group] for group in random_groups(20, seed=5)]
    actual, _ = evaluate(name, given, inputs(tied, torch.float64))
    assert not actual.loss.any() and not actual.gradient.any()


def test_ties_in_a_ranking_stand_against_those_below_alone():
    above, tied, other, below = (Answer(-d, 1, s, 0.0, 0.0) for d, s in ((3.0, 9), (1.0, 5), (2.0, 5), (4.0, 1)))
    actual, _ = evaluate("pl_dpo", {"beta": 1.0}, inputs([[tied, above, below, other]], torch.float64))

    def stage(first: float, *rest: float) -> float:
        return math.log(1 + sum(math.exp(each - first) for each in rest))

    expected = stage(-3.0, -1.0, -2.0, -4.0) + stage(-1.0, -4.0) + stage(-2.0, -4.0)
    assert actual.loss.item() == pytest.approx(expected, rel=1e-14)


# --- TPO ---


@pytest.mark.parametrize(
    ("scores", "gold", "chosen", "rejected"),
    [
        ((3, 9, 5, 1), [1], [2], [3]),
        ((3, 9, 3, 1), [1], [0, 2], [3]),  # two in second place
        ((9, 9, 5, 1), [0, 1], [0, 1], [3]),  # two in first place: the one that is not gold
        ((1, 9, 1, 1), [1], [1], [0, 2, 3]),  # nobody between the best and the worst: gold itself
        ((1, 9), [1], [1], [0]),
        ((9, 9, 1), [0, 1], [0, 1], [2]),
        ((4, 4, 4), [0, 1, 2], [], []),
    ],
)
def test_the_three_answers_of_tpo(scores, gold, chosen, rejected):
    """Who is pushed up by which term, and who down."""
    group = [Answer(-4.0, 2, score, 0.0, 0.0) for score in scores]
    for given, up, down in (({"nll_weight": 0.0}, chosen, rejected), ({"beta": 1e-4}, gold, [])):
        slopes = evaluate("tpo", given, inputs([group], torch.float64))[0].gradient[0].tolist()
        assert [place for place, slope in enumerate(slopes) if slope < -1e-3] == up
        assert [place for place, slope in enumerate(slopes) if slope > 1e-3] == down


# --- LiPO ---


def test_lipo_lambda_learns_from_the_first_step_on():
    """Policy and reference are equal, and so are all rewards: each pair has the mean gap of two ranks of four."""
    actual, out = evaluate(
        "lipo_lambda", {}, inputs([[Answer(-3.0, 1, s, -3.0, -3.0) for s in (0, 3, 1, 2)]], torch.float64)
    )
    discounts = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(5)]
    gap = sum(abs(a - b) for a, b in itertools.combinations(discounts, 2)) / 6
    gains = [2 ** (won / 3) for won in range(4)]
    weights = gap * sum(b - a for a, b in itertools.combinations(gains, 2))
    assert out.metrics["lambda"].item() == pytest.approx(weights, rel=1e-14)
    assert actual.loss.item() == pytest.approx(math.log(2) * weights, rel=1e-14)
    assert actual.gradient[0, 1] < actual.gradient[0, 3] < actual.gradient[0, 2] < actual.gradient[0, 0]


# --- what they say about themselves ---


def test_the_best_answers_nll_is_a_metric_where_it_is_in_the_loss():
    for name in OF_GROUPS:
        assert "nll" not in evaluate(name, {"nll_weight": 0.0}, inputs(GROUPS, torch.float64))[1].metrics
        nll = evaluate(name, {"nll_weight": 0.5}, inputs(GROUPS, torch.float64))[1].metrics["nll"]
        expected = [with_nll(group, (0.0, [0.0] * len(group)), 1.0)[0] for group in GROUPS]
        torch.testing.assert_close(nll, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("bdpo_list", {}, Requirements(reference=True, comprehension=True)),
        ("bdpo_list", {"bdpo_weights": False, "bdpo_scale": False}, Requirements(reference=True)),
        *[(name, {}, Requirements(reference=True)) for name in ("infonca", "lipo_lambda", "nca", "pl_dpo")],
        ("tpo", {}, Requirements()),
        ("tpo", {"tpo_length_normalized": True}, Requirements(length_normalised=True)),
    ],
)
def test_requirements_are_stated_and_suffice(name, given, expected):
    assert losses.get(name).requirements(losses.build_options(name, given)) == expected
    read = {"reference": expected.reference, "unconditional": expected.comprehension, "unsafe": False}
    unread = {each: None for each, is_read in read.items() if not is_read}
    evaluate(name, given, replace(inputs(GROUPS, torch.float32), **unread))


@pytest.mark.parametrize("name", OF_GROUPS)
def test_every_number_has_a_range(name):
    kinds = field_types(losses.get(name).options)
    for each in fields(losses.get(name).options):
        if kinds[each.name].type in (int, float):
            with pytest.raises(UserError, match=re.escape(flag(each.name))):
                losses.build_options(name, {each.name: -1e30})


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_mix_refuses_them_by_name(name):
    with pytest.raises(UserError, match=f"'{name}' is a loss of all answers to a prompt"):
        losses.get(f"dpo=1,{name}=0.5")
