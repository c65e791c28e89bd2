"""Every loss of groups against a plain-Python fp64 closed form, and what does not matter to it: order and padding."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import asdict, fields, replace
from typing import NamedTuple

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.comprehension import list_scale, list_weights
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import GroupLogProbs, GroupLosses, PairLogProbs, Requirements, registry
from megatron_bdpo.losses.groups import GroupReport, group_report
from megatron_bdpo.losses.options import field_types, flag
from tests.harness.group_forms import ALL_PAIRS, GROUP_CASES, GROUP_FORMS, Answer, Group, ordered_pairs, with_nll

OF_GROUPS = sorted(spec.name for spec in losses.all_specs() if spec.of_groups)


def random_groups(count: int, sizes: tuple[int, ...] = (2, 3, 4, 5), seed: int = 0, ties: bool = True) -> list[Group]:
    """Log-probs on a grid of 1/16 and scores of a few values, so that fp32 holds them exactly."""
    rng = random.Random(seed)

    def log_prob(tokens: int) -> float:
        return -round(16 * tokens * rng.uniform(0.05, 5)) / 16 - 1 / 16

    def answer(score: float) -> Answer:
        n = rng.choice([1, 2, 7, 60])
        return Answer(log_prob(n), n, score, log_prob(n), log_prob(n))

    def group() -> Group:
        size = rng.choice(sizes)
        return list(map(answer, rng.choices([-1.5, 1.0, 2.0, 4.5], k=size) if ties else rng.sample(range(9), size)))

    return [group() for _ in range(count)]


AT_THE_REFERENCE = [[a._replace(l=a.r) for a in group] for group in random_groups(4, seed=1)]
EXTREME = [  # |z| = 1e3 at beta 0.1, two rewards that are equal, all scores equal, I near +-1e3
    [Answer(-10.0, 1, 2, -10.0, -12.0), Answer(-10010.0, 1, 1, -10.0, -11.0), Answer(-5.0, 1, 1.5, -10005.0, -4.0)],
    [Answer(-10010.0, 1, 2, -10.0, -11.0), Answer(-10.0, 1, 1, -10.0, -12.0)],
    [Answer(-3.0, 1, 0, -4.0, -5.0), Answer(-4.0, 1, 1, -5.0, -4.5), Answer(-9.0, 1, 1, -7.0, -4.5)],
    [Answer(-3.0, 1, 3, -4.0, -5.0), Answer(-9.0, 1, 3, -7.0, -4.5)],
    [Answer(-1.0, 1, 0, -1.0, -1001.0), Answer(-9.0, 1, 2, -800.0, -2.0), Answer(-9.0, 1, 1, -8.0, -8.0)],
]
GROUPS = random_groups(100) + AT_THE_REFERENCE + EXTREME


def inputs(groups: list[Group], dtype: torch.dtype, places: int = 0, absent: float = 0.0) -> GroupLogProbs:
    """Groups in the given number of places or as many as the largest needs, the empty ones filled."""
    places = max([places, *map(len, groups)])

    def table(field: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
        rows = [[getattr(a, field) for a in group] + [fill] * (places - len(group)) for group in groups]
        return torch.tensor(rows, dtype=dtype).reshape(len(groups), places)

    return GroupLogProbs(
        policy=table("l", absent, dtype).requires_grad_(),
        tokens=table("n", 1, torch.int64),
        score=table("score", absent, dtype),
        present=torch.tensor([len(group) for group in groups])[:, None] > torch.arange(places),
        reference=table("r", -absent, dtype),
        unconditional=table("u", absent, dtype),
        unsafe=table("h", 0, torch.int64),
    )


class Result(NamedTuple):
    loss: torch.Tensor
    gradient: torch.Tensor
    """[G, K], in the policy's log-probs."""


def evaluate(name: str, given: dict[str, object], groups: GroupLogProbs) -> tuple[Result, GroupLosses]:
    out = losses.get(name).function(groups, losses.build_options(name, given))
    return Result(out.loss, *torch.autograd.grad(out.loss.sum(), groups.policy)), out


def told(out: GroupLosses) -> dict[str, torch.Tensor]:
    return {"reward": out.reward, **out.metrics}


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
    expected_reward = [0.1 * (a.l - a.r) for a in GROUPS[0]]
    if options["beta"] == 0.1:
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

COMPARING = [case for case in GROUP_CASES if case[0] not in ("infonca", "nca") and not case[1].get("nll_weight")]


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


# --- of two answers ---

# 64 of them: the ends of other arrays would not be in torch's vector kernels on a CPU, whose exp has another last bit.
TWO = random_groups(63, sizes=(2,), seed=2, ties=False) + EXTREME[1:2]


def as_pairs(groups: list[Group], dtype: torch.dtype) -> PairLogProbs:
    both = [sorted(group, key=lambda a: -a.score) for group in groups]
    chosen, rejected = (inputs([[group[i]] for group in both], dtype) for i in (0, 1))
    names = ("policy", "tokens", "reference", "unconditional")
    columns = [getattr(each, name).detach()[:, 0] for name in names for each in (chosen, rejected)]
    columns[:2] = [column.requires_grad_() for column in columns[:2]]
    return PairLogProbs(*columns)


def of_pairs(name: str, given: dict[str, object], groups: list[Group], dtype: torch.dtype):
    """Loss [G], gradient [G, 2] of better and worse answer, and all that is told."""
    pairs = as_pairs(groups, dtype)
    out = losses.get(name).function(pairs, losses.build_options(name, given))
    gradient = torch.autograd.grad(out.loss.sum(), (pairs.policy_chosen, pairs.policy_rejected))
    return out.loss, torch.stack(gradient, 1), out


def of_two(name: str, given: dict[str, object], groups: list[Group], dtype: torch.dtype, places: int = 2):
    """The same of a loss of groups."""
    actual, out = evaluate(name, given, inputs(groups, dtype, places=places, absent=5.0))
    order = torch.tensor([[0, 1] if group[0].score > group[1].score else [1, 0] for group in groups])
    return actual.loss, actual.gradient.gather(1, order), replace(out, reward=out.reward.gather(1, order))


BALANCES = [
    {},
    {"bdpo_weights": False},
    {"bdpo_scale": False},
    {"bdpo_weights": False, "bdpo_scale": False},
    {"bdpo_temperature": 0.2, "beta": 0.3, "nll_weight": 0.7},
    {"bdpo_comprehension": "sum", "bdpo_temperature": 30.0},
    {"bdpo_temperature": math.inf},
]
LIKE_PAIRS = [
    *[("bdpo_list", {**form, **given}, "bdpo", given) for form in ({}, ALL_PAIRS) for given in BALANCES],
    *[("pl_dpo", given, "dpo", given) for given in ({}, {"beta": 1.0, "nll_weight": 0.5})],
]


@pytest.mark.parametrize("places", [2, 5])
@pytest.mark.parametrize(("name", "given", "pair_loss", "pair_given"), LIKE_PAIRS, ids=str)
def test_of_two_answers_they_are_losses_of_pairs_to_the_bit(name, given, pair_loss, pair_given, places):
    """In the dtype of training."""
    expected_loss, expected_gradient, expected_out = of_pairs(pair_loss, pair_given, TWO, torch.float32)
    loss, gradient, out = of_two(name, given, TWO, torch.float32, places)
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)
    rewards = torch.stack([expected_out.chosen_reward, expected_out.rejected_reward], 1)
    assert torch.equal(out.reward, rewards)
    assert out.metrics.keys() == expected_out.metrics.keys()
    for key, value in out.metrics.items():
        assert torch.equal(value, expected_out.metrics[key]), key


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 5.0])
def test_infonca_of_two_answers_is_dpo_with_label_smoothing(alpha):
    for group in TWO[:20]:
        gap = abs(group[0].score - group[1].score)
        smoothing = {"label_smoothing": 1 / (1 + math.exp(min(gap / alpha, 700.0)))}
        expected_loss, expected_gradient, _ = of_pairs("dpo", smoothing, [group], torch.float64)
        loss, gradient, _ = of_two("infonca", {"nca_alpha": alpha}, [group], torch.float64)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 5.0])
def test_nca_of_two_answers_is_nca_pair_either_way_round(alpha):
    for group in TWO[:20]:
        better, worse = sorted(group, key=lambda a: -a.score)
        lost = 1 / (1 + math.exp(min((better.score - worse.score) / alpha, 700.0)))
        swapped = [better._replace(score=worse.score), worse._replace(score=better.score)]
        loss_as_is, gradient_as_is, _ = of_pairs("nca_pair", {}, [group], torch.float64)
        loss_swapped, gradient_swapped, _ = of_pairs("nca_pair", {}, [swapped], torch.float64)
        loss, gradient, _ = of_two("nca", {"nca_alpha": alpha}, [group], torch.float64)
        expected_gradient = (1 - lost) * gradient_as_is + lost * gradient_swapped.flip(1)
        torch.testing.assert_close(loss, (1 - lost) * loss_as_is + lost * loss_swapped, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


def test_nca_of_equal_scores_is_least_at_the_reference():
    level = [[a._replace(score=1.0, l=a.r) for a in group] for group in random_groups(10)]
    actual, _ = evaluate("nca", {}, inputs(level, torch.float64))
    assert actual.gradient.abs().max() < 1e-16


@pytest.mark.parametrize("labels", ["win-rate", "score"])
def test_lipo_lambda_of_two_answers_is_dpo_times_a_factor(labels):
    expected_loss, expected_gradient, _ = of_pairs("dpo", {}, TWO, torch.float64)
    loss, gradient, _ = of_two("lipo_lambda", {"lipo_labels": labels}, TWO, torch.float64)
    psi = [sorted((a.score for a in group), reverse=True) if labels == "score" else (1, 0) for group in TWO]
    factor = torch.tensor([(2**high - 2**low) * (1 - 1 / math.log2(3)) for high, low in psi], dtype=torch.float64)
    torch.testing.assert_close(loss, factor * expected_loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, factor[:, None] * expected_gradient, rtol=1e-12, atol=1e-13)


# --- B-DPO ---


@pytest.mark.parametrize("given", BALANCES, ids=str)
def test_all_pairs_is_the_mean_of_bdpo_over_the_pairs(given):
    for group in random_groups(10, seed=4):
        if not (pairs := ordered_pairs(group)):
            continue
        nll_weight = given.get("nll_weight", 0.0)
        loss, gradient, _ = of_pairs(
            "bdpo", {**given, "nll_weight": 0.0}, [[group[i], group[j]] for i, j in pairs], torch.float64
        )
        slopes = [0.0] * len(group)
        for (i, j), (slope_i, slope_j) in zip(pairs, gradient.tolist(), strict=True):
            slopes[i] += slope_i / len(pairs)
            slopes[j] += slope_j / len(pairs)
        expected_loss, expected_slopes = with_nll(group, (loss.mean().item(), slopes), nll_weight)
        actual, _ = evaluate("bdpo_list", {**ALL_PAIRS, **given}, inputs([group], torch.float64))
        assert actual.loss.item() == pytest.approx(expected_loss, rel=1e-12)
        assert actual.gradient[0].tolist() == pytest.approx(expected_slopes, rel=1e-11, abs=1e-14)


def at_the_reference(k: int, seed: int) -> Group:
    rng = random.Random(seed)
    return [Answer(-7.0, 1, 0.0, -7.0, -7.0 - rng.uniform(-2, 2)) for _ in range(k)]


def norms_over_orders(name: str, group: Group) -> list[float]:
    """Of the gradient, for each order that the scores of a group could have."""
    ranked = [
        [a._replace(score=float(score)) for a, score in zip(group, order, strict=True)]
        for order in itertools.permutations(range(len(group)))
    ]
    return evaluate(name, {}, inputs(ranked, torch.float64))[0].gradient.norm(dim=1).tolist()


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_the_first_gradient_of_a_ranking_has_the_norm_of_pl_dpo_over_all_orders(k):
    group = at_the_reference(k, seed=k)
    balanced, plain = (norms_over_orders(name, group) for name in ("bdpo_list", "pl_dpo"))
    assert math.hypot(*balanced) == pytest.approx(math.hypot(*plain), rel=1e-13)

    groups = inputs([group], torch.float64)
    weights = list_weights(groups.reference - groups.unconditional, groups.present, 1.0)
    scaled = list_scale(weights, groups.present) * weights
    ratios = [found / other for found, other in zip(balanced, plain, strict=True)]
    assert scaled.min().item() * (1 - 1e-12) <= min(ratios) and max(ratios) <= scaled.max().item() * (1 + 1e-12)
    if k > 2:
        assert max(ratios) - min(ratios) > 0.1, "one order alone does not have it"


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_one_scale_of_a_group_keeps_norms_over_all_its_pairs(k):
    """What the docstring says of the scale that `all-pairs` does not have."""
    groups = inputs([at_the_reference(k, seed=k)], torch.float64)
    weights = list_weights(groups.reference - groups.unconditional, groups.present, 1.0)
    (scaled,) = list_scale(weights, groups.present)[:, None] * weights
    norms = [math.hypot(*pair) for pair in itertools.combinations(scaled.tolist(), 2)]
    assert math.hypot(*norms) / math.sqrt(len(norms)) == pytest.approx(math.sqrt(2), rel=1e-14)
    if k > 2:
        assert max(norms) - min(norms) > 0.1


@pytest.mark.parametrize("form", ["ranking", "all-pairs"])
def test_an_open_temperature_is_settled_by_all_pairs_of_all_groups(form):
    groups = random_groups(100, seed=7)
    pairs = [[group[i], group[j]] for group in groups for i, j in ordered_pairs(group)]
    wanted = registry.build_options("bdpo", {"bdpo_temperature": "auto"})
    expected, expected_described = registry.get("bdpo").settle(as_pairs(pairs, torch.float64), wanted)

    options = registry.build_options("bdpo_list", {"bdpo_temperature": "auto", "bdpo_list_form": form})
    spec, full = registry.get("bdpo_list"), inputs(groups, torch.float64, absent=1e30)
    assert spec.requirements(options).all_pairs
    with pytest.raises(ValueError, match="still open"):
        spec.function(full, options)
    settled, described = spec.settle(full, options)
    assert (settled, described) == (replace(options, bdpo_temperature=expected.bdpo_temperature), expected_described)
    assert spec.function(full, settled).loss.isfinite().all()


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


# --- reports ---


def test_a_groups_report():
    rewards = {"best": 3.0, "other best": 1.0, "middle": 2.0, "worst": 2.0 + 1e-6}
    scores = {"best": 5.0, "other best": 5.0, "middle": 1.0, "worst": 0.0}
    groups = inputs([[Answer(-1.0, 1, score, -1.0, -1.0) for score in scores.values()], GROUPS[-2]], torch.float64)
    reward = torch.tensor([list(rewards.values()), [4.0, 1.0, 7.0, 7.0]], dtype=torch.float64)
    report = group_report(groups, GroupLosses(reward[:, 0], reward))
    expected = GroupReport(
        accuracy=[(1 + 1 + 0 + 0 + 1 / 2) / 5, 0.0],  # the last pair's margin is rounding; the second group has no pair
        margin=[(1 + 1 - 1 - 1) / 5, 0.0],
        chosen=[2.0, 2.5],
        rejected=[2.0, 2.5],
        pairs=[5.0, 0.0],
    )
    for found, wanted in zip(report, expected, strict=True):
        assert found.tolist() == pytest.approx(wanted, abs=2e-6)


def test_a_report_of_two_answers_is_the_pairs():
    _, _, pairs = of_pairs("dpo", {}, TWO, torch.float64)
    _, out = evaluate("pl_dpo", {}, inputs(TWO, torch.float64))
    report = group_report(inputs(TWO, torch.float64), out)
    assert torch.equal(report.chosen, pairs.chosen_reward) and torch.equal(report.rejected, pairs.rejected_reward)
    assert torch.equal(report.margin, pairs.chosen_reward - pairs.rejected_reward)
    assert torch.equal(report.accuracy, (report.margin > 0).double())
    assert (report.pairs == 1).all()


def test_the_best_answers_nll_is_a_metric_where_it_is_in_the_loss():
    for name in OF_GROUPS:
        assert "nll" not in evaluate(name, {}, inputs(GROUPS, torch.float64))[1].metrics
        nll = evaluate(name, {"nll_weight": 0.5}, inputs(GROUPS, torch.float64))[1].metrics["nll"]
        expected = [with_nll(group, (0.0, [0.0] * len(group)), 1.0)[0] for group in GROUPS]
        torch.testing.assert_close(nll, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


# --- what they say about themselves ---


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("bdpo_list", {}, Requirements(reference=True, comprehension=True)),
        ("bdpo_list", {"bdpo_weights": False, "bdpo_scale": False}, Requirements(reference=True)),
        *[(name, {}, Requirements(reference=True)) for name in ("infonca", "lipo_lambda", "nca", "pl_dpo")],
    ],
)
def test_requirements_are_stated_and_suffice(name, given, expected):
    assert losses.get(name).requirements(losses.build_options(name, given)) == expected
    unread = {"unsafe": None} | ({} if expected.comprehension else {"unconditional": None})
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
