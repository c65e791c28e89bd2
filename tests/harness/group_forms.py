"""Losses of one group in plain Python floats, with gradients derived by hand, over lists of its answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.harness.closed_forms import sigmoid, softplus

Expected = tuple[float, list[float]]
"""Loss, and its gradient in each answer's log pi_theta(y_i|x)."""


class Answer(NamedTuple):
    """One answer of a group, as Python floats."""

    l: float  # policy  # noqa: E741
    n: int  # tokens
    score: float
    r: float  # reference
    u: float  # unconditional
    h: int = 0  # unsafe


Group = list[Answer]


def rewards(group: Group, beta: float) -> list[float]:
    return [beta * (a.l - a.r) for a in group]


def expected_rewards(name: str, group: Group, options: dict[str, Any]) -> list[float]:
    """What a loss tells of a group's answers."""
    if name == "tpo":
        return [options["beta"] * each for each in tpo_scores(group, options["tpo_length_normalized"])]
    return rewards(group, options["beta"])


def log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def softmax(values: list[float]) -> list[float]:
    below = [math.exp(value - max(values)) for value in values]
    return [value / sum(below) for value in below]


def ordered_pairs(group: Group) -> list[tuple[int, int]]:
    """Indices of the better and the other answer."""
    return [(i, j) for i, a in enumerate(group) for j, b in enumerate(group) if a.score > b.score]


def ranking(group: Group, r: list[float]) -> Expected:
    """Plackett-Luce of rewards, and its gradient in them."""
    loss, slopes = 0.0, [0.0] * len(group)
    for i, a in enumerate(group):
        among = [i, *(j for j, b in enumerate(group) if b.score < a.score)]
        loss += log_sum_exp([r[j] for j in among]) - r[i]
        slopes[i] -= 1
        for j, share in zip(among, softmax([r[j] for j in among]), strict=True):
            slopes[j] += share
    return loss, slopes


def pl_dpo(group: Group, beta: float) -> Expected:
    loss, slopes = ranking(group, rewards(group, beta))
    return loss, [beta * slope for slope in slopes]


def infonca(group: Group, beta: float, nca_alpha: float) -> Expected:
    r, p = rewards(group, beta), softmax([a.score / nca_alpha for a in group])
    loss = sum(share * (log_sum_exp(r) - reward) for share, reward in zip(p, r, strict=True))
    return loss, [beta * (model - share) for model, share in zip(softmax(r), p, strict=True)]


def nca(group: Group, beta: float, nca_alpha: float) -> Expected:
    r, p = rewards(group, beta), softmax([a.score / nca_alpha for a in group])
    both = list(zip(p, r, strict=True))
    loss = sum(share * softplus(-reward) + softplus(reward) / len(group) for share, reward in both)
    return loss, [beta * (sigmoid(reward) / len(group) - share * sigmoid(-reward)) for share, reward in both]


def mean_gaps(r: list[float]) -> list[list[float]]:
    """Of the discounts of each two answers: the mean over all rankings in which no reward stands above a higher one."""
    k = len(r)
    rankings = [
        order for order in itertools.permutations(range(k)) if all(r[a] >= r[b] for a, b in itertools.pairwise(order))
    ]
    gaps = [[0.0] * k for _ in r]
    for order in rankings:
        discount = {answer: 1 / math.log2(2 + place) for place, answer in enumerate(order)}
        for i, j in itertools.product(range(k), repeat=2):
            gaps[i][j] += abs(discount[i] - discount[j]) / len(rankings)
    return gaps


def labels(group: Group, kind: str) -> list[float]:
    if kind == "score":
        return [a.score for a in group]
    won = [sum((a.score > b.score) + (a.score == b.score) / 2 for b in group) - 1 / 2 for a in group]  # itself: a tie
    return [each / (len(group) - 1) for each in won]


def lipo_lambda(group: Group, beta: float, lipo_labels: str) -> Expected:
    r, psi = rewards(group, beta), labels(group, lipo_labels)
    gaps = mean_gaps(r)
    loss, slopes = 0.0, [0.0] * len(group)
    for i, j in ordered_pairs(group):
        weight = (2 ** psi[i] - 2 ** psi[j]) * gaps[i][j]
        loss += weight * softplus(r[j] - r[i])
        slopes[i] -= weight * beta * sigmoid(r[j] - r[i])
        slopes[j] += weight * beta * sigmoid(r[j] - r[i])
    return loss, slopes


def balance(
    group: Group, bdpo_temperature: float, bdpo_weights: bool, bdpo_scale: bool, bdpo_comprehension: str
) -> tuple[list[float], float]:
    """Weights and scale, as applied."""
    per_token = bdpo_comprehension == "per-token"
    w = softmax([-(a.r - a.u) / (a.n if per_token else 1) / bdpo_temperature for a in group])
    w = [len(group) * each for each in w]
    s = math.sqrt(len(group)) / math.hypot(*w)
    return w if bdpo_weights else [1.0] * len(group), s if bdpo_scale else 1.0


def bdpo_list(group: Group, beta: float, bdpo_list_form: str, **options: Any) -> Expected:
    if bdpo_list_form == "ranking":
        w, s = balance(group, **options)
        loss, slopes = ranking(group, [beta * s * each * (a.l - a.r) for each, a in zip(w, group, strict=True)])
        return loss, [beta * s * each * slope for each, slope in zip(w, slopes, strict=True)]
    pairs = ordered_pairs(group)
    loss, slopes = 0.0, [0.0] * len(group)
    for i, j in pairs:
        (w_i, w_j), s = balance([group[i], group[j]], **options)
        z = beta * s * (w_i * (group[i].l - group[i].r) - w_j * (group[j].l - group[j].r))
        loss += softplus(-z) / len(pairs)
        slopes[i] -= beta * s * w_i * sigmoid(-z) / len(pairs)
        slopes[j] += beta * s * w_j * sigmoid(-z) / len(pairs)
    return loss, slopes


def tpo_scores(group: Group, per_token: bool) -> list[float]:
    return [a.l / a.n if per_token else a.l for a in group]


def tpo(group: Group, beta: float, tpo_length_normalized: bool, tpo_gamma: float) -> Expected:
    """The mean over all orders in which no answer stands above one of a higher score."""
    s, loss, slopes = tpo_scores(group, tpo_length_normalized), 0.0, [0.0] * len(group)
    orders = [
        order
        for order in itertools.permutations(range(len(group)))
        if all(group[i].score >= group[j].score for i, j in itertools.pairwise(order))
    ]
    for first, second, *_, last in ((*order, order[-1]) for order in orders):
        w = second if group[second].score > group[last].score else first
        if group[w].score > group[last].score:
            z = beta * (s[w] - s[last]) - tpo_gamma
            loss += softplus(-z) / len(orders)
            for i, sign in ((w, -1), (last, 1)):
                slopes[i] += sign * beta * sigmoid(-z) / (group[i].n if tpo_length_normalized else 1) / len(orders)
    return loss, slopes


GROUP_FORMS: dict[str, Callable[..., Expected]] = {
    each.__name__: each for each in (bdpo_list, infonca, lipo_lambda, nca, pl_dpo, tpo)
}


def with_nll(group: Group, found: Expected, weight: float) -> Expected:
    """And the NLL of the best answer: of several, their mean."""
    loss, slopes = found
    best = [i for i, a in enumerate(group) if a.score == max(b.score for b in group)]
    nll = sum(-group[i].l / group[i].n for i in best) / len(best)
    pushed = [-weight / group[i].n / len(best) if i in best else 0.0 for i in range(len(group))]
    return loss + weight * nll, [slope + push for slope, push in zip(slopes, pushed, strict=True)]


ALL_PAIRS = {"bdpo_list_form": "all-pairs"}

GROUP_CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in sorted(GROUP_FORMS)],
    ("pl_dpo", {"beta": 0.5, "nll_weight": 0.3}),
    ("infonca", {"beta": 0.02, "nca_alpha": 1e-4, "nll_weight": 0.3}),
    ("infonca", {"nca_alpha": 20.0}),
    ("nca", {"beta": 0.02, "nca_alpha": 1e-4, "nll_weight": 0.3}),
    ("nca", {"nca_alpha": 20.0}),
    ("tpo", {"beta": 0.1, "nll_weight": 0.0}),
    ("tpo", {"beta": 2.0, "tpo_length_normalized": True, "tpo_gamma": 1.6, "nll_weight": 0.05}),
    ("lipo_lambda", {"beta": 0.5, "lipo_labels": "score", "nll_weight": 0.3}),
    ("bdpo_list", {"bdpo_weights": False}),
    ("bdpo_list", {"bdpo_scale": False}),
    ("bdpo_list", {"bdpo_weights": False, "bdpo_scale": False}),
    ("bdpo_list", {"bdpo_comprehension": "sum", "bdpo_temperature": 30.0, "nll_weight": 0.3}),
    ("bdpo_list", ALL_PAIRS),
    ("bdpo_list", {**ALL_PAIRS, "bdpo_weights": False}),
    ("bdpo_list", {**ALL_PAIRS, "bdpo_scale": False}),
    ("bdpo_list", {**ALL_PAIRS, "bdpo_weights": False, "bdpo_scale": False}),
    ("bdpo_list", {**ALL_PAIRS, "bdpo_comprehension": "sum", "bdpo_temperature": 30.0, "nll_weight": 0.3}),
]
