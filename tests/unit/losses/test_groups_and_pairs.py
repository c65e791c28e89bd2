"""Losses of groups beside losses of pairs: of two answers, over all pairs of a group, and in reports."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.comprehension import list_scale, list_weights
from megatron_bdpo.losses import GroupLosses, PairLogProbs, registry
from megatron_bdpo.losses.groups import GroupReport, group_report
from tests.harness.group_cases import EXTREME, GROUPS, evaluate, inputs, random_groups
from tests.harness.group_forms import ALL_PAIRS, Answer, Group, ordered_pairs, with_nll

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
TPO_L = {"tpo_length_normalized": True, "tpo_gamma": 0.5}
LIKE_PAIRS = [
    *[("bdpo_list", {**form, **given}, "bdpo", given) for form in ({}, ALL_PAIRS) for given in BALANCES],
    *[("pl_dpo", given, "dpo", given) for given in ({}, {"beta": 1.0, "nll_weight": 0.5})],
    *[("tpo", given, "cpo", given) for given in ({"beta": 0.1}, {"beta": 1.0, "nll_weight": 0.0})],
    *[("tpo", {"beta": 2.0, **TPO_L, "nll_weight": share}, "simpo", {"nll_weight": share}) for share in (0.0, 0.05)],
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
