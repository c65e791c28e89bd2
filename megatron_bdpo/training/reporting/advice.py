"""What a run's numbers say is going wrong, in time to do something about it: each once, with the flag to turn.

The thresholds are rules of thumb, wide enough that a healthy run does not meet them; they are in the units of the
metrics (rewards are beta times log-ratios in nats).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.step_plan import StepPlan
from megatron_bdpo.losses import LossFunction

#: Records that a rule about a running job looks at.
WINDOW = 20

_Means = Mapping[str, float]


@dataclass(frozen=True)
class _Rule:
    """Fires when ``applies`` to the means over the last WINDOW records, after ``patience`` of them."""

    applies: Callable[[_Means], bool]
    advice: str
    patience: int = WINDOW
    needs_reference: bool = False


_RULES = (
    _Rule(
        lambda m: m.get("rewards/chosen", 0.0) < -1.0,
        "the policy finds the chosen answers much less likely than its reference did (reward {rewards/chosen:+.2f}). "
        "A lower --lr or fewer steps hold them up; --nll-weight 1 does too, where the loss has it.",
        needs_reference=True,
    ),
    _Rule(
        lambda m: abs(m["rewards/accuracies"] - 0.5) < 0.05 and abs(m.get("rewards/margins", 1.0)) < 0.05,
        "accuracy stays at {rewards/accuracies:.2f}, margins at {rewards/margins:+.3f}: nothing is learned. Raise "
        "--lr, and check that chosen and rejected are not drawn at random.",
        patience=3 * WINDOW,
        needs_reference=True,
    ),
    _Rule(
        lambda m: m.get("rewards/margins", 0.0) > 20.0,
        "margins have grown to {rewards/margins:.1f}: the pairs are learned by heart. Lower --lr, train fewer epochs, "
        "or use a loss that is content with a margin (--preference-loss ipo, --label-smoothing).",
    ),
    _Rule(
        lambda m: m.get("scale", 1.0) < 0.8,
        "B-DPO's weights leave out one answer of most pairs (scale {scale:.2f}; 0.71 is all of one). Raise "
        "--bdpo-temperature, or set it to auto.",
    ),
)


@dataclass
class Advisor:
    """Watches the records of a run."""

    reads_reference: bool
    """Rewards are log-ratios, so 0 is where the policy started."""
    _records: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _seen: int = 0
    _given: set[str] = field(default_factory=set)

    def observe(self, record: Mapping[str, float]) -> list[str]:
        """Take in the metrics of a logged interval. Returns the advice that has become due with it."""
        self._records.append(record)
        self._seen += 1
        due = [rule for rule in _RULES if self._is_due(rule)]
        self._given |= {rule.advice for rule in due}
        return [rule.advice.format_map(self._means()) for rule in due]

    def _is_due(self, rule: _Rule) -> bool:
        if (
            rule.advice in self._given
            or self._seen < rule.patience
            or (rule.needs_reference and not self.reads_reference)
        ):
            return False
        return rule.applies(self._means())

    def _means(self) -> dict[str, float]:
        names = set.intersection(*(set(record) for record in self._records))
        return {name: math.fsum(record[name] for record in self._records) / len(self._records) for name in names}


def about_data(report: DataReport, plan: StepPlan) -> Iterator[str]:
    """What is known before the first step."""
    pairs = sum(report.pairs_kept)
    if report.truncated_prompts > pairs / 2:
        yield (
            f"{report.truncated_prompts / pairs:.0%} of the prompts are truncated: what is asked may be lost. Raise "
            "--max-prompt-length."
        )
    if report.truncated_responses > pairs:  # two each
        yield (
            f"{report.truncated_responses / (2 * pairs):.0%} of the answers are truncated: chosen and rejected may "
            "differ where they were cut. Raise --max-response-length."
        )
    if plan.fill < 0.8:
        yield (
            f"{1 - plan.fill:.0%} of the positions are padding. More --pairs-per-step or a longer --seq-length pack "
            "more tightly; --no-pack-pairs does not."
        )


def about_labels(loss: LossFunction, desirable: int, undesirable: int) -> Iterator[str]:
    """What the loss has to say of the number of desirable and undesirable answers that it trains on."""
    found = loss.spec.advise(desirable, undesirable, loss.options) if loss.spec.advise else None
    if found:
        yield found
