"""The gate at the first step: the policy still is its reference, so every margin is 0 and DPO's loss is ln 2.

When it is not, something is wrong that no later number would show: another tokenizer, position or attention plan in the
scoring pass, weights that were not loaded, a layout that loses a reduction (NeMo-Aligner #227).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.precision import Precision
from megatron_bdpo.training.distributed import sum_over_ranks


@dataclass(frozen=True)
class Deviation:
    """How far the first step is from exact equality: as seen, or as rounding alone may take it."""

    loss: float
    """Mean over pairs of the loss minus its value at policy == reference."""
    log_ratio: float
    """|log pi_theta - log pi_ref| per response token in nats, mean over pairs of the worse answer."""

    def within(self, allowed: Deviation) -> bool:
        """Neither is more; NaN is."""
        return abs(self.loss) <= allowed.loss and self.log_ratio <= allowed.log_ratio


#: By precision, here and nowhere else; ``benchmarks/fp8.py`` measures what they have to be (docs/fp8.md has figures).
#: fp32: the two passes may add in another order. Half precision: one unit in the last place of a hidden state.
TOLERANCES = {
    torch.float32: Deviation(loss=1e-6, log_ratio=1e-5),
    torch.bfloat16: Deviation(loss=1e-2, log_ratio=2e-2),
    torch.float16: Deviation(loss=2e-3, log_ratio=4e-3),
}

#: FP8: a scale is shared by values of several pairs, which are other ones in the two passes, and 3 bits of mantissa
#: are 16 times coarser than bf16's 7. Set from the bf16 row, not from a measurement on a GPU.
FP8_TOLERANCE = Deviation(loss=5e-2, log_ratio=1e-1)


def tolerance(precision: Precision) -> Deviation:
    """What rounding may do in this precision."""
    return FP8_TOLERANCE if precision.fp8_recipe else TOLERANCES[precision.dtype]


@dataclass
class StepZeroGate:
    """Collects each microbatch's deviation during the first step, then judges."""

    precision: Precision
    _sums: list[Tensor] = field(default_factory=list)

    def observe(self, loss: Tensor, at_reference: Tensor, log_ratio_per_token: Tensor) -> None:
        """Record the pairs of a microbatch. All arguments are [P]."""
        count = loss.new_full((), loss.numel())
        self._sums.append(
            torch.stack([(loss - at_reference).detach().sum(), log_ratio_per_token.detach().sum(), count])
        )

    def deviation(self) -> Deviation:
        """Of the step so far, over all ranks. Collective."""
        # Ranks with the same pairs report the same sums: the mean is unaffected. A rerun step counts twice: likewise.
        own = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(3, dtype=torch.float64)
        loss, log_ratio, count = sum_over_ranks(own.double().cpu()).tolist()
        return Deviation(abs(loss) / count, log_ratio / count)

    def judge(self) -> str:
        """Add up over ranks and compare. Collective.

        Returns:
            One line that says what was seen.

        Raises:
            UserError: the policy is not its reference.
        """
        found, allowed = self.deviation(), tolerance(self.precision)
        seen = (
            f"loss off by {found.loss:.1e} (allowed {allowed.loss:.0e}), "
            f"log-ratio {found.log_ratio:.1e} nats per token (allowed {allowed.log_ratio:.0e})"
        )
        if found.within(allowed):
            return f"step 0: policy equals reference, {seen}"
        raise UserError(
            f"step 0: the policy is not its reference: {seen}.\n"
            "Before the first update both are the same weights, so the loss of every pair must be its value at zero "
            "log-ratio (ln 2 for DPO and B-DPO). Likely causes: reference values scored under other settings or by "
            "another version (delete the reference cache), weights that did not load, or a kernel that is not "
            "deterministic between passes. --no-step-zero-check trains anyway."
        )
