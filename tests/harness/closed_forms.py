"""Losses of one pair in plain Python floats, with gradients derived by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Expected = tuple[float, float, float]
"""Loss, and its gradient in (log pi_theta(y_w|x), log pi_theta(y_l|x))."""


class Pair(NamedTuple):
    """One pair as Python floats; the arguments of PairLogProbs, in its order."""

    l_w: float  # policy
    l_l: float
    n_w: int  # tokens
    n_l: int
    r_w: float  # reference
    r_l: float
    u_w: float  # unconditional
    u_l: float
    h_w: int = 0  # unsafe
    h_l: int = 0
    c_w: float = 0.0  # sums of collision entropies
    c_l: float = 0.0
    b_w: float = 0.0  # policy, of the common length
    b_l: float = 0.0
    d_w: float = 0.0  # reference, likewise
    d_l: float = 0.0

    @property
    def margin(self) -> float:
        return (self.l_w - self.r_w) - (self.l_l - self.r_l)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x) = -log sigmoid(-x)"""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def rewards(p: Pair, beta: float) -> tuple[float, float]:
    return beta * (p.l_w - p.r_w), beta * (p.l_l - p.r_l)


def exo_pair(p: Pair, beta: float, label_smoothing: float) -> Expected:
    z = beta * p.margin
    log_odds = math.log((1 - label_smoothing) / label_smoothing)
    # q_w log q_w + q_l log q_l = z q_w - log(1 + e^z)
    loss = z * sigmoid(z) - softplus(z) - sigmoid(z) * math.log1p(-label_smoothing)
    loss -= sigmoid(-z) * math.log(label_smoothing)
    slope = beta * sigmoid(z) * sigmoid(-z) * (z - log_odds)
    return loss, slope, -slope


def nca_pair(p: Pair, beta: float) -> Expected:
    r_w, r_l = rewards(p, beta)
    loss = softplus(-r_w) + softplus(r_w) / 2 + softplus(r_l) / 2
    return loss, beta * (1.5 * sigmoid(r_w) - 1), beta * sigmoid(r_l) / 2


def bco_pair(p: Pair, beta: float) -> Expected:
    r_w, r_l = rewards(p, beta)
    return softplus(-r_w) + softplus(r_l), -beta * sigmoid(-r_w), beta * sigmoid(r_l)


def sppo_hard(p: Pair, beta: float) -> Expected:
    off_w, off_l = p.l_w - p.r_w - 0.5 / beta, p.l_l - p.r_l + 0.5 / beta
    return off_w**2 + off_l**2, 2 * off_w, 2 * off_l


def apo_zero(p: Pair, beta: float) -> Expected:
    r_w, r_l = rewards(p, beta)
    return sigmoid(-r_w) + sigmoid(r_l), -beta * sigmoid(r_w) * sigmoid(-r_w), beta * sigmoid(r_l) * sigmoid(-r_l)


def apo_down(p: Pair, beta: float) -> Expected:
    r_w, r_l = rewards(p, beta)
    z = r_w - r_l
    away = beta * sigmoid(z) * sigmoid(-z)
    return sigmoid(r_w) + sigmoid(-z), beta * sigmoid(r_w) * sigmoid(-r_w) - away, away


def discopop(p: Pair, beta: float, discopop_tau: float) -> Expected:
    z = beta * p.margin
    blend = sigmoid(z / discopop_tau)
    exponential = math.exp(-z - softplus(-z / discopop_tau))
    rest = sigmoid(-z / discopop_tau)
    loss = rest * softplus(-z) + exponential
    slope = -rest * blend / discopop_tau * softplus(-z) - rest * sigmoid(-z)
    slope += exponential * (rest / discopop_tau - 1)
    return loss, beta * slope, -beta * slope


def sigmoid_norm(p: Pair, beta: float) -> Expected:
    z = beta * ((p.l_w - p.r_w) / p.n_w - (p.l_l - p.r_l) / p.n_l)
    return softplus(-z), -beta * sigmoid(-z) / p.n_w, beta * sigmoid(-z) / p.n_l


def dpop(p: Pair, beta: float, dpop_lambda: float) -> Expected:
    lost = max(0.0, p.r_w - p.l_w)
    z = beta * (p.margin - dpop_lambda * lost)
    return softplus(-z), -beta * sigmoid(-z) * (1 + dpop_lambda * (lost > 0)), beta * sigmoid(-z)


def alphapo(p: Pair, beta: float, simpo_gamma: float, alphapo_alpha: float) -> Expected:
    def reward(mean: float) -> float:
        return beta * (1 - math.exp(mean) ** -alphapo_alpha) / alphapo_alpha if alphapo_alpha else beta * mean

    m_w, m_l = p.l_w / p.n_w, p.l_l / p.n_l
    z = reward(m_w) - reward(m_l) - simpo_gamma
    slope = beta * sigmoid(-z)
    return (
        softplus(-z),
        -slope * math.exp(-alphapo_alpha * m_w) / p.n_w,
        slope * math.exp(-alphapo_alpha * m_l) / p.n_l,
    )


def sft(p: Pair) -> Expected:
    return -p.l_w / p.n_w, -1 / p.n_w, 0.0


def dpo(p: Pair, beta: float, label_smoothing: float) -> Expected:
    z = beta * p.margin
    loss = (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)
    slope = beta * (label_smoothing - sigmoid(-z))
    return loss, slope, -slope


def robust(p: Pair, beta: float, label_smoothing: float) -> Expected:
    z = beta * p.margin
    loss = ((1 - label_smoothing) * softplus(-z) - label_smoothing * softplus(z)) / (1 - 2 * label_smoothing)
    slope = -beta * ((1 - label_smoothing) * sigmoid(-z) + label_smoothing * sigmoid(z)) / (1 - 2 * label_smoothing)
    return loss, slope, -slope


def bdpo(
    p: Pair, beta: float, bdpo_temperature: float, bdpo_weights: bool, bdpo_scale: bool, bdpo_comprehension: str
) -> Expected:
    per_token = bdpo_comprehension == "per-token"
    i_w = (p.r_w - p.u_w) / (p.n_w if per_token else 1)
    i_l = (p.r_l - p.u_l) / (p.n_l if per_token else 1)
    w_w, w_l = 2 * sigmoid((i_l - i_w) / bdpo_temperature), 2 * sigmoid((i_w - i_l) / bdpo_temperature)
    s = math.sqrt(2) / math.hypot(w_w, w_l) if bdpo_scale else 1.0
    if not bdpo_weights:
        w_w = w_l = 1.0
    z = beta * s * (w_w * (p.l_w - p.r_w) - w_l * (p.l_l - p.r_l))
    return softplus(-z), -beta * s * w_w * sigmoid(-z), beta * s * w_l * sigmoid(-z)


def ipo(p: Pair, beta: float, ipo_length_normalized: bool) -> Expected:
    n_w, n_l = (p.n_w, p.n_l) if ipo_length_normalized else (1, 1)
    residual = (p.l_w - p.r_w) / n_w - (p.l_l - p.r_l) / n_l - 1 / (2 * beta)
    return residual**2, 2 * residual / n_w, -2 * residual / n_l


def hinge(p: Pair, beta: float) -> Expected:
    gap = 1 - beta * p.margin
    return max(0.0, gap), -beta * (gap > 0), beta * (gap > 0)


def simpo(p: Pair, beta: float, simpo_gamma: float) -> Expected:
    z = beta * (p.l_w / p.n_w - p.l_l / p.n_l) - simpo_gamma
    return softplus(-z), -beta * sigmoid(-z) / p.n_w, beta * sigmoid(-z) / p.n_l


def cpo(p: Pair, beta: float) -> Expected:
    z = beta * (p.l_w - p.l_l)
    return softplus(-z), -beta * sigmoid(-z), beta * sigmoid(-z)


def orpo(p: Pair, orpo_weight: float) -> Expected:
    m_w, m_l = p.l_w / p.n_w, p.l_l / p.n_l
    theta = (m_w - math.log(-math.expm1(m_w))) - (m_l - math.log(-math.expm1(m_l)))
    loss = -m_w + orpo_weight * softplus(-theta)
    slope_w = -orpo_weight * sigmoid(-theta) / -math.expm1(m_w)  # d logit(m) / dm = 1 / (1 - e^m)
    slope_l = orpo_weight * sigmoid(-theta) / -math.expm1(m_l)
    return loss, (slope_w - 1) / p.n_w, slope_l / p.n_l


def safedpo(p: Pair, beta: float, safedpo_delta: float) -> Expected:
    z = beta * p.margin - (p.h_l - p.h_w) * safedpo_delta
    return softplus(-z), -beta * sigmoid(-z), beta * sigmoid(-z)


def aot(pairs: list[Pair], beta: float, label_smoothing: float) -> list[Expected]:
    """Of the pairs of a step."""
    found = [(0.0, 0.0, 0.0)] * len(pairs)
    reference = sorted(p.r_w - p.r_l for p in pairs)
    for place, i in enumerate(sorted(range(len(pairs)), key=lambda i: pairs[i].l_w - pairs[i].l_l)):
        as_if = pairs[i]._replace(r_w=reference[place], r_l=0.0)
        found[i] = dpo(as_if, beta, label_smoothing)
    return found


def aot_unpaired(pairs: list[Pair], beta: float, label_smoothing: float) -> list[Expected]:
    """Of the pairs of a step: a loss is told with the chosen answer's pair."""
    chosen = sorted(range(len(pairs)), key=lambda i: pairs[i].l_w - pairs[i].r_w)
    rejected = sorted(range(len(pairs)), key=lambda i: pairs[i].l_l - pairs[i].r_l)
    losses, grads_w, grads_l = [0.0] * len(pairs), [0.0] * len(pairs), [0.0] * len(pairs)
    for i, j in zip(chosen, rejected, strict=True):
        met = pairs[i]._replace(l_l=pairs[j].l_l, r_l=pairs[j].r_l)
        losses[i], grads_w[i], grads_l[j] = dpo(met, beta, label_smoothing)
    return list(zip(losses, grads_w, grads_l, strict=True))


#: Of losses that look at whole steps.
STEP_FORMS: dict[str, Callable[..., list[Expected]]] = {"aot": aot, "aot_unpaired": aot_unpaired}


def score(log_ratio: float, f_divergence: str, f_alpha_divergence_coef: float) -> tuple[float, float]:
    """f'(t) of log t, and its slope in log t; t at least e^(-80 / a)."""
    match f_divergence:
        case "js_divergence":  # log(2t / (1 + t))
            return math.log(2) - softplus(-log_ratio), sigmoid(-log_ratio)
        case "forward_kl":
            a = 1.0
        case "alpha_divergence":
            a = 1 - f_alpha_divergence_coef
    if f_divergence == "reverse_kl" or a == 0:
        return log_ratio, 1.0
    power = math.exp(min(-a * log_ratio, 80.0))  # t^-a
    return (1 - power) / a, power if -a * log_ratio < 80 else 0.0


def with_modifiers(
    oracle: Callable[..., Expected],
    p: Pair,
    nll_weight: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    reference_free: bool = False,
    ld_alpha: float = 1.0,
    use_weighting: bool = False,
    **options: Any,
) -> Expected:
    """A closed form at the scores that stand in the place of log-ratios, with an NLL, times WPO's weights.

    Gradients are those in the whole log-probs; see ``in_beginnings``.
    """
    whole = p
    if ld_alpha < 1:
        p = counted(p, ld_alpha)
    (s_w, slope_w), (s_l, slope_l) = (p.l_w, 1.0), (p.l_l, 1.0)
    own = p
    if f_divergence != "reverse_kl":
        s_w, slope_w = score(p.l_w - p.r_w, f_divergence, f_alpha_divergence_coef)
        s_l, slope_l = score(p.l_l - p.r_l, f_divergence, f_alpha_divergence_coef)
    if f_divergence != "reverse_kl" or reference_free:
        own = p._replace(l_w=s_w, l_l=s_l, r_w=0.0, r_l=0.0)
    loss, grad_w, grad_l = oracle(own, **options)
    p = whole
    loss -= nll_weight * p.l_w / p.n_w
    grad_w = grad_w * slope_w * ld_alpha - nll_weight / p.n_w
    weight = 1.0
    if use_weighting:
        weight = math.exp((p.l_w + p.c_w) / p.n_w) * math.exp((p.l_l + p.c_l) / p.n_l)
    return weight * loss, weight * grad_w, weight * grad_l * slope_l * ld_alpha


def counted(p: Pair, ld_alpha: float) -> Pair:
    """LD-DPO: what is behind the common length counts a share."""
    kept = {"l_w": (p.l_w, p.b_w), "l_l": (p.l_l, p.b_l), "r_w": (p.r_w, p.d_w), "r_l": (p.r_l, p.d_l)}
    shares: dict[str, Any] = {
        name: ld_alpha * all_of_it + (1 - ld_alpha) * own for name, (all_of_it, own) in kept.items()
    }
    return p._replace(**shares)


def in_beginnings(
    oracle: Callable[..., Expected], p: Pair, ld_alpha: float = 1.0, nll_weight: float = 0.0, **options: Any
) -> tuple[float, float]:
    """The gradient in the policy's log-probs of the common length: what LD-DPO takes from that in the whole ones."""
    if ld_alpha == 1:
        return 0.0, 0.0
    *_, grad_w, grad_l = with_modifiers(oracle, counted(p, ld_alpha), **options)
    return (1 - ld_alpha) * grad_w, (1 - ld_alpha) * grad_l


CLOSED_FORMS: dict[str, Callable[..., Expected]] = {
    each.__name__: each
    for each in (
        alphapo,
        apo_down,
        apo_zero,
        bco_pair,
        bdpo,
        cpo,
        discopop,
        dpo,
        dpop,
        exo_pair,
        hinge,
        ipo,
        nca_pair,
        orpo,
        robust,
        safedpo,
        sft,
        sigmoid_norm,
        simpo,
        sppo_hard,
    )
}


def expected_rewards(name: str, p: Pair, options: dict[str, Any]) -> tuple[float, float]:
    """Those of a loss without modifiers."""
    match name:
        case "alphapo":
            alpha, means = options["alphapo_alpha"], (p.l_w / p.n_w, p.l_l / p.n_l)
            power = [-math.expm1(-alpha * each) / alpha if alpha else each for each in means]
            return options["beta"] * power[0], options["beta"] * power[1]
        case "cpo":
            return options["beta"] * p.l_w, options["beta"] * p.l_l
        case "orpo" | "sft" | "simpo":
            scale = 1.0 if name == "sft" else options["orpo_weight" if name == "orpo" else "beta"]
            return scale * p.l_w / p.n_w, scale * p.l_l / p.n_l
        case "sigmoid_norm":
            return options["beta"] * (p.l_w - p.r_w) / p.n_w, options["beta"] * (p.l_l - p.r_l) / p.n_l
    return rewards(p, options["beta"])


CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in sorted(CLOSED_FORMS)],
    ("alphapo", {"alphapo_alpha": 0.0, "nll_weight": 0.5}),
    ("alphapo", {"alphapo_alpha": -0.5, "beta": 10.0, "simpo_gamma": 3.0}),
    ("apo_down", {"beta": 0.5, "nll_weight": 0.5}),
    ("apo_zero", {"beta": 0.5, "nll_weight": 0.5}),
    ("bco_pair", {"beta": 0.5, "nll_weight": 0.5}),
    ("discopop", {"beta": 0.03, "discopop_tau": 1.0, "nll_weight": 0.5}),
    ("dpop", {"dpop_lambda": 0.0}),
    ("dpop", {"beta": 0.3, "dpop_lambda": 5.0, "nll_weight": 0.5}),
    ("exo_pair", {"beta": 0.03, "label_smoothing": 0.2, "nll_weight": 0.5}),
    ("nca_pair", {"beta": 0.01, "nll_weight": 0.5}),
    ("sigmoid_norm", {"beta": 0.1, "nll_weight": 0.5}),
    ("sppo_hard", {"beta": 0.5, "nll_weight": 0.5}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2, "nll_weight": 0.3}),
    ("bdpo", {"bdpo_weights": False}),
    ("bdpo", {"bdpo_scale": False}),
    ("bdpo", {"bdpo_weights": False, "bdpo_scale": False}),
    ("bdpo", {"bdpo_comprehension": "sum", "bdpo_temperature": 30.0}),
    ("bdpo", {"beta": 0.3, "bdpo_temperature": 0.2, "nll_weight": 2.0}),
    ("ipo", {"beta": 0.4, "ipo_length_normalized": False, "nll_weight": 0.5}),
    ("hinge", {"beta": 0.03, "nll_weight": 1.0}),
    ("robust", {"label_smoothing": 0.3, "nll_weight": 0.5}),
    ("robust", {"label_smoothing": 0.0}),
    ("simpo", {"beta": 10.0, "simpo_gamma": 3.0, "nll_weight": 0.5}),
    ("cpo", {"beta": 0.4, "nll_weight": 0.0}),
    ("orpo", {"orpo_weight": 1.0}),
    ("orpo", {"orpo_weight": 0.0}),
    ("safedpo", {"safedpo_delta": 3.0, "nll_weight": 0.5}),
    ("aot", {}),
    ("aot", {"beta": 0.5, "label_smoothing": 0.2, "nll_weight": 0.5}),
    ("aot_unpaired", {}),
    ("aot_unpaired", {"beta": 0.5, "label_smoothing": 0.2, "nll_weight": 0.5}),
    ("dpo", {"f_divergence": "forward_kl", "nll_weight": 0.5}),
    ("dpo", {"f_divergence": "js_divergence", "label_smoothing": 0.2}),
    ("dpo", {"f_divergence": "alpha_divergence"}),
    ("dpo", {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.0}),
    ("dpo", {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.75, "beta": 0.3}),
    ("dpo", {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("dpo", {"reference_free": True, "nll_weight": 0.5}),
    ("hinge", {"f_divergence": "js_divergence", "beta": 2.0}),
    ("ipo", {"f_divergence": "js_divergence"}),
    ("ipo", {"reference_free": True}),
    ("exo_pair", {"f_divergence": "js_divergence", "beta": 1.0}),
    ("robust", {"f_divergence": "js_divergence"}),
    ("discopop", {"f_divergence": "js_divergence", "discopop_tau": 1.0}),
    ("safedpo", {"f_divergence": "js_divergence", "safedpo_delta": 3.0}),
    ("sigmoid_norm", {"f_divergence": "js_divergence"}),
    ("sigmoid_norm", {"reference_free": True}),
    ("dpo", {"ld_alpha": 0.5}),
    ("dpo", {"ld_alpha": 0.5, "nll_weight": 0.5}),
    ("dpo", {"ld_alpha": 0.0, "reference_free": True}),
    ("dpo", {"ld_alpha": 0.3, "f_divergence": "js_divergence"}),
    ("hinge", {"ld_alpha": 0.25}),
    ("ipo", {"ld_alpha": 0.5, "f_divergence": "js_divergence"}),
    ("sigmoid_norm", {"ld_alpha": 0.75}),
    ("safedpo", {"ld_alpha": 0.5}),
    ("exo_pair", {"ld_alpha": 0.5}),
    ("robust", {"ld_alpha": 0.5}),
    ("discopop", {"ld_alpha": 0.5, "discopop_tau": 1.0}),
    ("bdpo", {"use_weighting": True}),
    ("dpo", {"use_weighting": True, "f_divergence": "js_divergence", "nll_weight": 0.5}),
    ("sft", {"use_weighting": True}),
    ("simpo", {"use_weighting": True}),
]
