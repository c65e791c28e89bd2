"""How well the reference model comprehends each response of a pair, and the B-DPO weights that follow from it.

    I(x; y)  = (log pi_ref(y|x) - log pi_ref(y)) / |y|        what the prompt x tells about the response y
    w_w, w_l = 2 softmax(-[I_w, I_l] / tau)                   the better understood response is pushed less
    s        = sqrt(2) / ||(w_w, w_l)||_2                     keeps the size of the gradient

    x prompt, y response of |y| tokens, pi_ref frozen reference, tau temperature; w chosen, l rejected.

Source: B-DPO, arXiv 2603.22829. THIS IS OUR RECONSTRUCTION, from the paper's abstract and a published summary, which
say what these quantities are for but do not give the formulas. The choices that are ours: the estimator of I, its
division by |y|, the softmax with its temperature, and the norm that s preserves.

Of k answers (our extension, `losses.bdpo_list`): w = k softmax(-I / tau), which sum to k, and s = sqrt(k) / ||w||_2.

All tensors are [P], P preference pairs, where it does not say otherwise. Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def mutual_information(conditional: Tensor, unconditional: Tensor, tokens: Tensor, per_token: bool = True) -> Tensor:
    """Pointwise mutual information I(x; y) of prompt and response under the reference model.

    Args:
        conditional: log pi_ref(y|x), summed over the response tokens, nats, [P].
        unconditional: log pi_ref(y): the same tokens after the empty prompt, nats, [P].
        tokens: |y| >= 1, integer, [P].
        per_token: divide by |y|. False leaves the sum, which grows with the response's length.

    Returns:
        I in nats per token (or nats), [P], in the log-probs' dtype. Negative where the prompt makes y less likely.
    """
    information = conditional - unconditional
    return information / tokens if per_token else information


@torch.no_grad()
def balanced_weights(
    chosen_information: Tensor, rejected_information: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Balanced weights (w_w, w_l) = 2 softmax(-[I_w, I_l] / tau) = 2 sigmoid(-+(I_w - I_l) / tau), summing to 2.

    Args:
        chosen_information: I_w, [P].
        rejected_information: I_l, [P].
        temperature: tau > 0 in the unit of I. `math.inf` turns the balancing off.

    Returns:
        (w_w, w_l), each [P]. Exactly 1.0 and 1.0, to the bit, where I_w equals I_l or tau is infinite.
    """
    information = torch.stack([chosen_information, rejected_information], dim=-1)
    w_w, w_l = list_weights(information, torch.ones_like(information, dtype=torch.bool), temperature).unbind(-1)
    return w_w, w_l


@torch.no_grad()
def list_weights(information: Tensor, present: Tensor, temperature: float) -> Tensor:
    """Balanced weights w = k softmax(-I / tau) of the k answers to one prompt, summing to k.

    Args:
        information: I, [..., K].
        present: bool, [..., K]: which of the K places hold an answer. What the others hold is finite.
        temperature: tau > 0 in the unit of I. `math.inf` turns the balancing off.

    Returns:
        [..., K]; 0 where no answer is. Of two answers exactly 1.0 and 1.0, to the bit, where tau is infinite or their I
        are equal.
    """
    # k sigmoid of minus the log-sum-exp over the others' (I_i - I_j) / tau: of differences, so that a quotient beyond
    # the largest number is a weight of 0 or k, never inf - inf.
    difference = (information[..., :, None] - information[..., None, :]) / temperature
    others = present[..., None, :] & ~torch.eye(present.shape[-1], dtype=torch.bool, device=present.device)
    smallest = torch.finfo(information.dtype).min
    weights = torch.sigmoid(-torch.where(others, difference, smallest).logsumexp(-1))
    return torch.where(present, present.sum(-1, keepdim=True) * weights, 0)


#: The rule of :func:`automatic_temperature`: in this share of the pairs the larger weight is at most this many times
#: the smaller one.
AUTOMATIC_SHARE, AUTOMATIC_RATIO = 0.9, 3.0


@torch.no_grad()
def automatic_temperature(chosen_information: Tensor, rejected_information: Tensor) -> float:
    """The temperature that suits a data set: tau = q / ln 3, q the 0.9 quantile of |I_w - I_l|.

    The ratio of a pair's weights is exp(|I_w - I_l| / tau). So in nine of ten pairs the weights stay between 1/2 and
    3/2, and in the tenth that is least balanced they go beyond. A quantile, because a few short responses have
    imbalances that say nothing about the others. This rule is ours, not the paper's.

    Args:
        chosen_information: I_w of the training pairs, [P].
        rejected_information: I_l, [P].

    Returns:
        tau > 0 in the unit of I, or 0 where at least nine of ten pairs are balanced already.
    """
    imbalance = (chosen_information - rejected_information).abs().double()
    return float(quantiles(imbalance, [AUTOMATIC_SHARE])) / math.log(AUTOMATIC_RATIO)


@torch.no_grad()
def quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Quantiles with linear interpolation, to the bit those of ``torch.quantile``, which refuses more than 2^24 values.

    Args:
        values: any number of them, [P >= 1].
        shares: S numbers in [0, 1].

    Returns:
        [S] float64 on the host; NaN where any of the values is.
    """
    rank = torch.tensor(shares, dtype=torch.float64) * (len(values) - 1)
    below, above = rank.floor().long(), rank.ceil().long()
    places = torch.cat([below, above, torch.tensor([len(values) - 1])]).unique()  # the last one: NaN goes to the end
    ordered = torch.from_numpy(np.partition(values.double().cpu().numpy(), places.tolist()))
    if ordered[-1].isnan():
        return torch.full_like(rank, math.nan)
    return torch.lerp(ordered[below], ordered[above], rank - below)


@torch.no_grad()
def gradient_scale(w_w: Tensor, w_l: Tensor) -> Tensor:
    """Scale s = sqrt(2) / ||(w_w, w_l)||_2, [P]: in (1/sqrt(2), 1] for weights that sum to 2.

    With it the gradient of -log sigmoid(z), z = beta s (w_w Delta_w - w_l Delta_l), in the two policy log-probs has
    norm sqrt(2) beta sigmoid(-z) whatever the weights: DPO's at the same z. Exactly 1.0 for weights (1, 1).
    """
    weights = torch.stack([w_w, w_l], dim=-1)
    return list_scale(weights, torch.ones_like(weights, dtype=torch.bool))


@torch.no_grad()
def list_scale(weights: Tensor, present: Tensor) -> Tensor:
    """Scale s = sqrt(k) / ||w||_2 of the k answers to one prompt: in (1 / sqrt(k), 1] for weights that sum to k.

    Args:
        weights: [..., K], 0 where no answer is.
        present: bool, [..., K].

    Returns:
        [...]. Exactly 1.0 for weights of 1.
    """
    # One rounding fewer than sqrt(k) / norm: exact at weights of 1.
    return torch.sqrt(present.sum(-1) / weights.square().sum(-1))
