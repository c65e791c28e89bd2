"""What the data decide, once, at a run's first start: open options of the loss, and the quartiles of the imbalance.

Both are taken from the reference's values of the training pairs that the planned steps use: all of them, where the run
is an epoch or longer. Held-out pairs have no part in it, nor has what else a directory of log-probs may hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bdpo.losses import GroupLogProbs, LossFunction, PairLogProbs
from megatron_bdpo.losses.options import open_options
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, say
from megatron_bdpo.training.reporting.quartiles import IMBALANCE, quartile_edges


def decide_options(
    loss: LossFunction, pairs: PairLogProbs | GroupLogProbs, of: int, kept: Mapping[str, Any]
) -> tuple[LossFunction, dict[str, Any]]:
    """The loss with all its options, and by name the values of those that were open. Collective.

    Args:
        pairs: the training pairs that the run uses, with the reference as the policy; of a loss of groups these.
        of: the number of all training pairs, or groups.
        kept: what the run's first start has decided; empty at that start.

    Raises:
        UserError: on every rank, when the data do not decide an option.
    """
    if loss.spec.settle is None:
        return loss, {}
    names = open_options(loss.options)
    options = replace(loss.options, **{name: kept[name] for name in names if name in kept})
    with all_ranks_agree():
        options, described = loss.spec.settle(pairs, options)
    options = broadcast(options)  # to the bit, whatever the ranks' machines are
    if described:
        say(described)
    decided = {name: getattr(options, name) for name in names}
    for name, value in decided.items():
        say(f"loss: {name} {value:.6g}, {_origin(name in kept, pairs, of)}")
    return replace(loss, options=options), decided


def imbalance_edges(
    loss: LossFunction, pairs: PairLogProbs | GroupLogProbs, of: int, kept: Sequence[float]
) -> list[float]:
    """The three edges between the quartiles of the pairs' imbalance; none where the loss does not read it. Collective.

    Args:
        loss: with all its options; the others are as in :func:`decide_options`.
    """
    if not loss.requirements.comprehension:
        return []
    if IMBALANCE not in loss(pairs[:1]).metrics:
        return []
    edges = broadcast(list(kept) or quartile_edges(_imbalances(loss, pairs)).tolist())
    say(f"quartiles of the imbalance: {', '.join(f'{edge:.4g}' for edge in edges)}, {_origin(bool(kept), pairs, of)}")
    return edges


def _imbalances(loss: LossFunction, pairs: PairLogProbs | GroupLogProbs) -> npt.NDArray[np.float64]:
    """Of all pairs, [P]; some at a time, because a loss makes many other arrays beside it."""
    blocks = (pairs[start : start + _BLOCK] for start in range(0, len(pairs), _BLOCK))
    losses = (loss(block) for block in blocks)
    return np.concatenate([each.metrics[IMBALANCE].numpy() for each in losses])


_BLOCK = 2**20  # pairs


def _origin(is_kept: bool, pairs: PairLogProbs | GroupLogProbs, of: int) -> str:
    noun = "groups" if isinstance(pairs, GroupLogProbs) else "pairs"
    return "as at the run's first start" if is_kept else f"from {len(pairs)} of {of} training {noun}"
