"""The few expressions that several losses share. All tensors are [P]; symbols as in `base.PairLogProbs`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_bdpo.losses.base import PairLogProbs, PairLosses


def required(tensor: Tensor | None, name: str) -> Tensor:
    """An optional entry of `PairLogProbs` that the loss's `Requirements` asked for."""
    assert tensor is not None, f"the loss needs PairLogProbs.{name}: see LossSpec.requirements(options)"
    return tensor


def log_ratios(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """(Delta_w, Delta_l), Delta = log pi_theta(y|x) - log pi_ref(y|x), in nats; or the scores in their place."""
    if pairs.chosen_score is not None:
        return pairs.chosen_score, required(pairs.rejected_score, "rejected_score")
    return (
        pairs.policy_chosen - required(pairs.reference_chosen, "reference_chosen"),
        pairs.policy_rejected - required(pairs.reference_rejected, "reference_rejected"),
    )


def mean_log_probs(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """(log pi_theta(y_w|x) / |y_w|, log pi_theta(y_l|x) / |y_l|), in nats per token."""
    return pairs.policy_chosen / pairs.chosen_tokens, pairs.policy_rejected / pairs.rejected_tokens


def rewarded(
    loss: Tensor, scale: float, chosen: Tensor, rejected: Tensor, metrics: dict[str, Tensor] | None = None
) -> PairLosses:
    """The loss with the rewards scale * chosen and scale * rejected, detached."""
    return PairLosses(loss, scale * chosen.detach(), scale * rejected.detach(), metrics or {})


def add_nll(losses: PairLosses, pairs: PairLogProbs, weight: float) -> PairLosses:
    """loss + weight * NLL, NLL = -log pi_theta(y_w|x) / |y_w| in nats per token, also reported as the metric `nll`.

    RPO, arXiv 2404.19733 (v3, where the weight is on the NLL term). Response tokens only.
    """
    if weight == 0:
        return losses
    nll = -pairs.policy_chosen / pairs.chosen_tokens
    return replace(losses, loss=losses.loss + weight * nll, metrics={**losses.metrics, "nll": nll.detach()})
