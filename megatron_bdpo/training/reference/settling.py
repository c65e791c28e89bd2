"""Options of a loss that the data settle: once, at a run's first start, from the reference's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bdpo.losses import PairLogProbs
from megatron_bdpo.losses.options import open_options
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, say
from megatron_bdpo.training.forward import PairLossFunction


def settle(
    loss: PairLossFunction, pairs: PairLogProbs, kept: Mapping[str, Any]
) -> tuple[PairLossFunction, dict[str, Any]]:
    """The loss with all its options, and by name the values of those that were open. Collective.

    Args:
        pairs: all training pairs, with the reference as the policy.
        kept: what the run's first start has settled; empty at that start.

    Raises:
        UserError: on every rank, when the data do not settle an option.
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
    settled = {name: getattr(options, name) for name in names}
    for name, value in settled.items():
        say(f"loss: {name} {value:.6g}" + (", as at the run's first start" if name in kept else ", from the data"))
    return replace(loss, options=options), settled
