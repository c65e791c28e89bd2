"""The gate at the first step: the policy still is its reference, so every margin is 0 and DPO's loss is ln 2.

When it is not, something is wrong that no later number would show: another tokenizer, position or attention plan in the
scoring pass, weights that were not loaded, a layout that loses a reduction (NeMo-Aligner #227).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import AnswerLogProbs, GroupLogProbs, LossFunction, PairLogProbs
from megatron_bdpo.model.precision import Precision
from megatron_bdpo.training.distributed import sum_over_ranks

#: Nats that rounding may move the log-prob of one token by, between two passes over it in other packs. By precision,
#: here and nowhere else; ``benchmarks/fp8.py`` measures what it has to be (docs/performance.md has figures).
#:
#: Half precision, by arithmetic: rounding the last hidden state once moves a logit by about 2**-9 / sqrt(3) = 0.0011
#: (bf16) of the logits' spread, which is some 10 nats; the residual stream is rounded again after each of a hundred or
#: so sub-layers: 0.0011 * 10 * sqrt(100) = 0.1. fp16 has three bits more: 0.014. fp32: the two passes may add in
#: another order.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}

#: FP8: a scale is shared by values of several pairs, which are other ones in the two passes, and 3 bits of mantissa
#: are 16 times coarser than bf16's 7. Set from the bf16 row, not from a measurement on a GPU.
FP8_TOLERANCE = 5e-1

#: fp32 in Transformer Engine's layers, whose matrix products read TF32 (its ``cublaslt_gemm.cu``): fp16's mantissa, in
#: the operands alone.
TF32_TOLERANCE = TOLERANCES[torch.float16]


def tolerance(precision: Precision) -> float:
    """Nats that rounding may move one token's log-prob by."""
    if precision.fp8_recipe:
        return FP8_TOLERANCE
    return TF32_TOLERANCE if precision.tf32 else TOLERANCES[precision.dtype]


@dataclass(frozen=True)
class Deviation:
    """How far the first step is from exact equality: as seen, and as a share of what rounding explains.

    An answer of n tokens adds up n log-probs whose roundings are independent: it may be off by the tolerance times
    sqrt(n), not n. So one token may be off by all of the tolerance, and the mean over 100 by a tenth of it.
    A pair's loss may be off by what its answers may be, times the slope that it has there: as far as it changes when
    both log-probs change by their tolerance, whichever way.
    """

    loss: float
    """|mean over pairs of the loss minus its value at policy == reference|."""
    loss_share: float
    """The same, of the mean of the pairs' tolerances."""
    log_ratio: float
    """|log pi_theta - log pi_ref| per response token in nats, mean over pairs of the worse answer."""
    log_ratio_share: float
    """|log pi_theta - log pi_ref| of its tolerance, mean over pairs of the worse answer."""

    @property
    def is_rounding(self) -> bool:
        """Neither is more than rounding explains. NaN counts as more."""
        return self.loss_share <= 1 and self.log_ratio_share <= 1

    def __str__(self) -> str:
        return (
            f"log-ratios off by {self.log_ratio:.1e} nats per token, {_times(self.log_ratio_share)} what rounding "
            f"explains; loss off by {self.loss:.1e}, {_times(self.loss_share)}"
        )


def _times(share: float) -> str:
    return f"{share:.2g} times"


@dataclass
class StepZeroGate:
    """Collects each microbatch's deviation during the first step, then judges."""

    precision: Precision
    _sums: list[Tensor] = field(default_factory=list)

    def observe(self, read: PairLogProbs | GroupLogProbs | AnswerLogProbs, loss: LossFunction) -> None:
        """Record a microbatch's pairs, groups or labelled answers, N of them, under the run's loss, which reads the
        reference's log-probs."""
        observers: dict[type, Callable[[Any, LossFunction], None]] = {
            PairLogProbs: self._observe_pairs,
            GroupLogProbs: self._observe_groups,
            AnswerLogProbs: self._observe_answers,
        }
        observers[type(read)](read, loss)

    def _observe_pairs(self, pairs: PairLogProbs, loss: LossFunction) -> None:
        names = ["chosen", "rejected"]
        counts = [pairs.chosen_tokens, pairs.rejected_tokens]
        if pairs.policy_chosen_beginning is not None:
            names += ["chosen_beginning", "rejected_beginning"]
            counts += [torch.minimum(*counts)] * 2

        def losses(log_probs: Tensor) -> Tensor:
            values = {f"policy_{name}": column for name, column in zip(names, log_probs.unbind(1), strict=True)}
            return _judged(loss, replace(pairs, **values))

        policy, reference = (
            torch.stack([getattr(pairs, f"{model}_{name}") for name in names], dim=1)
            for model in ("policy", "reference")
        )
        tokens = torch.stack(counts, dim=1)
        # All losses are convex there, or rise or fall with each log-prob (`LossSpec.function`): farthest in a corner.
        self._observe(policy, reference, tokens, losses, _farthest_corner)

    def _observe_groups(self, groups: GroupLogProbs, loss: LossFunction) -> None:
        def losses(log_probs: Tensor) -> Tensor:
            return _judged(loss, replace(groups, policy=log_probs))

        assert groups.reference is not None
        reference = groups.reference
        policy = torch.where(groups.present, groups.policy, reference)  # elsewhere nothing may be off
        self._observe(policy, reference, groups.tokens, losses, _one_by_one)

    def _observe_answers(self, answers: AnswerLogProbs, loss: LossFunction) -> None:
        """There the step would have found 0 for them.

        What is wrong with that raises the losses of one label and lowers those of the other: it is not their mean that
        counts, but how far each is off.
        """
        assert answers.reference is not None

        def losses(log_probs: Tensor, shift: Tensor | None) -> Tensor:
            return _judged(loss, replace(answers, policy=log_probs.squeeze(1), shift=shift))

        at_reference = functools.partial(losses, shift=None if answers.shift is None else answers.shift * 0)
        policy, reference = answers.policy.detach()[:, None], answers.reference[:, None]
        off = (losses(policy, answers.shift) - at_reference(reference)).abs()
        self._observe(policy, reference, answers.tokens[:, None], at_reference, _one_by_one, off)

    def _observe(
        self,
        policy: Tensor,
        reference: Tensor,
        tokens: Tensor,
        losses: Callable[[Tensor], Tensor],
        most: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor],
        losses_off: Tensor | None = None,
    ) -> None:
        """
        Args:
            policy, reference, tokens: [N, k] of N losses, each of k answers.
            losses: [N] of log-probs [N, k].
            most: [N] by how much ``losses`` may be off at log-probs [N, k] that are off by what is allowed, [N, k].
            losses_off: [N] by how much they are off; None: the policy's less those at policy == reference.
        """
        off = (policy.detach() - reference).abs()
        allowed = tolerance(self.precision) * tokens.to(off.dtype).sqrt()
        at_reference = losses(reference)
        worse = [(off / each).amax(dim=1) for each in (tokens, allowed)]
        explained = most(losses, reference, allowed)
        by = losses(policy.detach()) - at_reference if losses_off is None else losses_off
        own = [by, explained, *worse, torch.ones_like(at_reference)]
        self._sums.append(torch.stack([each.double().sum() for each in own]))

    def deviation(self) -> Deviation:
        """Of the step so far, over all ranks. Collective."""
        # Ranks with the same pairs report the same sums: the mean is unaffected. A rerun step counts twice: likewise.
        own = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(5, dtype=torch.float64)
        loss, allowed, log_ratio, share, count = sum_over_ranks(own.cpu()).tolist()
        loss_share = abs(loss) / max(allowed, sys.float_info.min)  # a loss that is flat there must not have moved
        return Deviation(abs(loss) / count, loss_share, log_ratio / count, share / count)

    def judge(self) -> str:
        """Add up over ranks and compare. Collective.

        Returns:
            One line that says what was seen.

        Raises:
            UserError: the policy is not its reference.
        """
        found = self.deviation()
        if found.is_rounding:
            return f"step 0: policy equals reference: {found}"
        raise UserError(
            f"step 0: the policy is not its reference: {found}.\n"
            "Before the first update both are the same weights, so the loss of every pair must be its value at zero "
            "log-ratio (ln 2 for DPO and B-DPO). Likely causes: reference values scored under other settings or by "
            "another version (delete the reference cache), weights that did not load, or a kernel that is not "
            "deterministic between passes. --no-step-zero-check trains anyway."
        )


def _judged(loss: LossFunction, read: PairLogProbs | GroupLogProbs | AnswerLogProbs) -> Tensor:
    """[N] the losses; 0 of one that jumps, of which the log-probs alone are judged."""
    losses: Tensor = loss(read).loss
    return torch.zeros_like(losses) if loss.spec.jumps else losses


def _farthest_corner(losses: Callable[[Tensor], Tensor], reference: Tensor, allowed: Tensor) -> Tensor:
    """With all log-probs off, whichever way."""
    signs = itertools.product((1, -1), repeat=reference.shape[1])
    corners = [losses(reference + allowed * allowed.new_tensor(each)) for each in signs]
    return (torch.stack(corners) - losses(reference)).abs().amax(dim=0)


def _one_by_one(losses: Callable[[Tensor], Tensor], reference: Tensor, allowed: Tensor) -> Tensor:
    """With one log-prob off, whichever way, added up over all of them: corners are too many."""
    at_reference = losses(reference)
    answers = torch.eye(reference.shape[1], dtype=torch.bool, device=reference.device)
    moved = [torch.stack([losses(reference + sign * allowed * one) for sign in (1, -1)]) for one in answers]
    return sum(((each - at_reference).abs().amax(dim=0) for each in moved), torch.zeros_like(at_reference))
