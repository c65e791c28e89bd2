"""What goes into a preference loss, what comes out, and what a loss says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairLogProbs:
    """Log-probs of P preference pairs. Every tensor is [P]; the floating ones share one dtype (fp32 in training).

    Log-probs are sums over the response tokens, in nats. Only the policy's carry a gradient. The optional entries are
    there when the loss's `Requirements` ask for them.
    """

    policy_chosen: Tensor
    """log pi_theta(y_w|x)"""
    policy_rejected: Tensor
    """log pi_theta(y_l|x)"""
    chosen_tokens: Tensor
    """|y_w| >= 1, integer"""
    rejected_tokens: Tensor
    """|y_l| >= 1, integer"""
    reference_chosen: Tensor | None = None
    """log pi_ref(y_w|x)"""
    reference_rejected: Tensor | None = None
    """log pi_ref(y_l|x)"""
    unconditional_chosen: Tensor | None = None
    """log pi_ref(y_w): the same tokens after the empty prompt"""
    unconditional_rejected: Tensor | None = None
    """log pi_ref(y_l)"""
    chosen_unsafe: Tensor | None = None
    """h_w: 1 or True where the chosen response is unsafe"""
    rejected_unsafe: Tensor | None = None
    """h_l"""

    @classmethod
    def of_sequences(
        cls,
        tokens: Tensor,
        policy: Tensor,
        reference: Tensor | None = None,
        unconditional: Tensor | None = None,
        unsafe: Tensor | None = None,
    ) -> PairLogProbs:
        """From values of S = 2 P sequences, chosen and rejected alternating, as a pack has them.

        Args:
            tokens: [S] response tokens.
            policy: [S] log-probs, in nats.
            reference: [S], or None where the loss does not read it.
            unconditional: [S], the reference's after the empty prompt, or None.
            unsafe: [P, 2] of chosen and rejected, or None.
        """

        def pair(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if values is None else (values[0::2], values[1::2])

        return cls(
            policy[0::2],
            policy[1::2],
            tokens[0::2],
            tokens[1::2],
            *pair(reference),
            *pair(unconditional),
            *((None, None) if unsafe is None else (unsafe[:, 0], unsafe[:, 1])),
        )


@dataclass(frozen=True, eq=False)
class PairLosses:
    """Per-pair results, every tensor [P]. Averaging is the caller's: only the caller knows the step's pair count."""

    loss: Tensor
    """Differentiable in the policy's log-probs."""
    chosen_reward: Tensor
    """Detached: beta Delta_w with a reference; without one, the scaled log-prob that the loss compares."""
    rejected_reward: Tensor
    """Detached: the same of y_l."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached extras of this loss, by name."""


@dataclass(frozen=True)
class Requirements:
    """What a loss, as configured, reads beyond the policy's log-probs, so that nothing is computed in vain."""

    reference: bool = False
    """The `reference_*` log-probs."""
    comprehension: bool = False
    """The `unconditional_*` log-probs, and with them the unconditional scoring pass."""
    safety: bool = False
    """The `*_unsafe` labels."""
    all_pairs: bool = False
    """The reference's log-probs of all pairs trained on before the first step: `LossSpec.settle` needs them."""
    length_normalised: bool = False
    """The preference term compares log-probs per token, not their sums."""


@dataclass(frozen=True)
class LossSpec[Options]:
    """A preference loss as the registry holds it.

    `options` is a frozen dataclass type whose fields all have defaults and are float, int, bool, str or a `Literal` of
    strings; each becomes a command-line flag (see `option`). Equally named fields of two losses mean the same thing.
    """

    name: str
    function: Callable[[PairLogProbs, Options], PairLosses]
    """Pure: no in-place writes, no collectives, no host synchronisation; results in the inputs' dtype.

    The check of the first step takes the loss to be convex in the log-probs: what rounding may do to it is judged at
    the corners of what rounding may do to them.
    """
    options: type[Options]
    requirements: Callable[[Options], Requirements]
    summary: str
    """One line for `--help` and reports."""
    source: str
    """Paper and equation."""
    settle: Callable[[PairLogProbs, Options], tuple[Options, str]] | None = None
    """Looks at the reference's log-probs of all pairs that the run trains on, where they are known before the first
    step: settles the options that follow from them, and describes what it has seen. The policy is the reference."""


AnyLossSpec = LossSpec[Any]
