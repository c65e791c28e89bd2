"""B-DPO of any number of answers: OUR EXTENSION of `bdpo`, in two forms. Of two answers both are `bdpo`.

    ranking     L = -sum_i log( e^{r_i} / (e^{r_i} + sum_{j: score_j < score_i} e^{r_j}) ),     Plackett-Luce
                r_i = beta s w_i Delta_i
                w = k softmax(-I / tau),   s = sqrt(k) / ||w||_2     of the group's k answers

    all-pairs   L = mean over score_i > score_j of -log sigmoid(beta s_ij (w_i Delta_i - w_j Delta_j))
                (w_i, w_j) = 2 softmax(-[I_i, I_j] / tau),   s_ij = sqrt(2) / ||(w_i, w_j)||_2     of the pair

    Delta_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response
    I_i     = comprehension of answer i, tau = bdpo_temperature; bdpo_weights and bdpo_scale are the switches of `bdpo`

Answers of equal score are not compared: see `pl_dpo`.

I, w and s carry no gradient. What s keeps:

- all-pairs is the mean of `bdpo` over the group's pairs: each pair's gradient in its two log-probs has norm
  sqrt(2) beta sigmoid(-z) for every w. One s of the whole group would keep that as a root mean square over the pairs
  only. With both switches on the group's weights and the pair's scale would be the same: of w only ratios are left.
- ranking has gradient beta s w_i g_i, g = dL / dr. At r = 0, as at the first step, its norm is that of `pl_dpo`
  as a root mean square over the k! orders that the scores could have: there each answer has the same mean of g_i^2,
  and s^2 ||w||^2 = k. For one order it is that times a number between s min w and s max w.

Source: our own, after B-DPO, arXiv 2603.22829 (of pairs, and itself our reconstruction: see `comprehension`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from megatron_bdpo.comprehension import list_scale, list_weights, mutual_information
from megatron_bdpo.losses import bdpo
from megatron_bdpo.losses.base import LossSpec, PairLogProbs
from megatron_bdpo.losses.group_terms import add_best_nll, differences, group_log_ratios, plackett_luce
from megatron_bdpo.losses.groups import GroupLogProbs, GroupLosses, answer_mean, pair_mean
from megatron_bdpo.losses.options import option
from megatron_bdpo.losses.terms import required


@dataclass(frozen=True)
class BdpoListOptions(bdpo.BdpoOptions):
    bdpo_list_form: Literal["ranking", "all-pairs"] = option(
        "ranking", "Plackett-Luce of the ranking, or the mean over all pairs of a group"
    )


def settle(groups: GroupLogProbs, options: BdpoListOptions) -> tuple[BdpoListOptions, str]:
    """`--bdpo-temperature auto` as of pairs, here all pairs of all groups: see `bdpo.settle`."""
    groups = groups.cleared()
    settled, described = bdpo.settle(_pairs_of(groups)[groups.pairs().flatten()], options)
    return cast(BdpoListOptions, settled), described


def bdpo_list(groups: GroupLogProbs, options: BdpoListOptions) -> GroupLosses:
    """B-DPO per group, [G], in nats; rewards beta Delta_i, without weights, so that runs compare.

    Metrics, those of `bdpo`: of the ranking, chosen is the best answer and rejected the worst one, and the imbalance
    a mean over pairs; of all-pairs they are means over pairs.
    """
    groups = groups.cleared()
    form = _all_pairs if options.bdpo_list_form == "all-pairs" else _ranking
    loss, metrics = form(groups, options)
    reward = options.beta * group_log_ratios(groups).detach()
    return add_best_nll(GroupLosses(loss, reward, metrics), groups, options.nll_weight)


def _ranking(groups: GroupLogProbs, options: BdpoListOptions) -> tuple[Tensor, dict[str, Tensor]]:
    delta, pairs = group_log_ratios(groups), groups.pairs()
    w, s = groups.present.to(delta.dtype), torch.ones_like(delta[:, 0])
    metrics: dict[str, Tensor] = {}
    if bdpo.requirements(options).comprehension:
        information = mutual_information(
            required(groups.reference, "reference"),
            required(groups.unconditional, "unconditional"),
            groups.tokens,
            per_token=options.bdpo_comprehension == "per-token",
        )
        balanced = list_weights(information, groups.present, bdpo.temperature(options))
        if options.bdpo_weights:
            w = balanced
        if options.bdpo_scale:
            s = list_scale(balanced, groups.present)
        metrics = {
            "comprehension/chosen": answer_mean(information, groups.best()),
            "comprehension/rejected": answer_mean(information, groups.worst()),
            "comprehension/imbalance": pair_mean(differences(information).abs(), pairs),
        }
    loss = plackett_luce(options.beta * (s[:, None, None] * differences(w * delta)), pairs)
    metrics |= {
        "weights/chosen": answer_mean(w, groups.best()),
        "weights/rejected": answer_mean(w, groups.worst()),
        "scale": s,
    }
    return loss, metrics


def _all_pairs(groups: GroupLogProbs, options: BdpoListOptions) -> tuple[Tensor, dict[str, Tensor]]:
    pairs = groups.pairs()
    losses = bdpo.bdpo(_pairs_of(groups), replace(options, nll_weight=0.0))

    def mean(values: Tensor) -> Tensor:
        return pair_mean(values.view(pairs.shape), pairs)

    return mean(losses.loss), {name: mean(values) for name, values in losses.metrics.items()}


def _pairs_of(groups: GroupLogProbs) -> PairLogProbs:
    """Every two places of a group as a pair, [G K K]; `GroupLogProbs.pairs` says which are pairs."""

    def table(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        first, second = torch.broadcast_tensors(values[:, :, None], values[:, None, :])
        return torch.stack([first, second], dim=-1).flatten(0, 2)

    tokens, policy = cast(Tensor, table(groups.tokens)), cast(Tensor, table(groups.policy))
    return PairLogProbs.of_pairs(tokens, policy, table(groups.reference), table(groups.unconditional))


SPEC = LossSpec(
    name="bdpo_list",
    function=bdpo_list,
    options=BdpoListOptions,
    requirements=bdpo.requirements,
    summary="Balanced DPO on any number of answers, our extension",
    source="our own, after arXiv 2603.22829",
    settle=settle,
    takes="groups",
)
