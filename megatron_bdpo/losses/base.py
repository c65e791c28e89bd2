"""What goes into a preference loss, what comes out, and what a loss says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_bdpo.losses.options import told

BoolArray = npt.NDArray[np.bool_]

Takes = Literal["pairs", "groups", "answers"]
"""What a loss is of: pairs, prompts with all their answers and these answers' scores, or labelled answers."""


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
    chosen_collision_entropy: Tensor | None = None
    """Sum over y_w's tokens of -log sum_v pi_theta(v|x, before)^2, without gradient"""
    rejected_collision_entropy: Tensor | None = None
    """The same of y_l"""
    policy_chosen_beginning: Tensor | None = None
    """log pi_theta of y_w's first min(|y_w|, |y_l|) response tokens"""
    policy_rejected_beginning: Tensor | None = None
    """The same of y_l"""
    reference_chosen_beginning: Tensor | None = None
    """log pi_ref of y_w's first min(|y_w|, |y_l|) response tokens"""
    reference_rejected_beginning: Tensor | None = None
    """The same of y_l"""
    chosen_target: Tensor | None = None
    """What `LossSpec.step_targets` has found for the pair among those of its step; None where no step is looked at"""
    rejected_target: Tensor | None = None
    """The other of the two"""
    chosen_score: Tensor | None = None
    """What a loss of a difference compares in the place of Delta_w (`modifiers`); None: Delta_w"""
    rejected_score: Tensor | None = None
    """The same of y_l"""

    @classmethod
    def of_pairs(
        cls,
        tokens: Tensor,
        policy: Tensor,
        reference: Tensor | None = None,
        unconditional: Tensor | None = None,
        unsafe: Tensor | None = None,
        collision_entropy: Tensor | None = None,
        policy_beginnings: Tensor | None = None,
        reference_beginnings: Tensor | None = None,
    ) -> PairLogProbs:
        """From tables of pairs, [P, 2] of chosen and rejected: values [A] of answers, indexed with pairs [P, 2].

        Args:
            tokens: response tokens.
            policy: log-probs, in nats.
            reference: None where the loss does not read it.
            unconditional: the reference's after the empty prompt, or None.
            unsafe: labels, or None.
            collision_entropy: the policy's, or None where the loss does not read it.
            policy_beginnings, reference_beginnings: log-probs of the pairs' common lengths, or None likewise.
        """

        def columns(table: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, None) if table is None else table.unbind(1)

        others = (reference, unconditional, unsafe, collision_entropy, policy_beginnings, reference_beginnings)
        return cls(*policy.unbind(1), *tokens.unbind(1), *(column for each in others for column in columns(each)))

    def __len__(self) -> int:
        """P."""
        return len(self.policy_chosen)

    def __getitem__(self, some: slice | Tensor) -> PairLogProbs:
        """Some of the pairs: views of a slice, or copies of those that a mask [P] names."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: value[some] for name, value in values.items() if value is not None})


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

    @property
    def rewards(self) -> Tensor:
        """[P, 2] of chosen and rejected."""
        return torch.stack([self.chosen_reward, self.rejected_reward], dim=1)


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
    collision_entropy: bool = False
    """The policy's `*_collision_entropy`."""
    beginnings: bool = False
    """The `policy_*_beginning`, and with `reference` the `reference_*_beginning`."""
    length_normalised: bool = False
    """The preference term compares log-probs per token, not their sums."""
    mismatched: bool = False
    """Log-probs of the step's answers after other prompts than their own: `LossSpec.step_shift` gets those in the place
    of the answers' own."""


def keep_all(labels: npt.NDArray[np.int8]) -> tuple[BoolArray, BoolArray]:
    """All pairs, as they are. See `LossSpec.select`."""
    return np.ones(len(labels), bool), np.zeros(len(labels), bool)


@dataclass(frozen=True)
class LossSpec[Options, Answers, Losses]:
    """A preference loss as the registry holds it: of `PairLogProbs`, `groups.GroupLogProbs` or
    `answers.AnswerLogProbs`.

    `options` is a frozen dataclass type whose fields all have defaults and are float, int, bool, str or a `Literal` of
    strings; each becomes a command-line flag (see `option`). Equally named fields of two losses mean the same thing.
    """

    name: str
    function: Callable[[Answers, Options], Losses]
    """Pure: no in-place writes, no collectives, no host synchronisation; results in the inputs' dtype.

    The check of the first step takes the loss to be convex or monotone in each log-prob near the reference's: what
    rounding may do to it is judged at the corners of what rounding may do to them.
    """
    options: type[Options]
    requirements: Callable[[Options], Requirements]
    summary: str
    """One line for `--help` and reports."""
    source: str
    """Paper and equation."""
    settle: Callable[[Answers, Options], tuple[Options, str]] | None = None
    """Looks at the reference's log-probs of all pairs that the run trains on, where they are known before the first
    step: settles the options that follow from them, and describes what it has seen. The policy is the reference."""
    elsewhere: tuple[str, ...] = ()
    """What other trainers call it, to tell those who come from there: TRL's ``sigmoid`` is DPO."""
    select: Callable[[npt.NDArray[np.int8]], tuple[BoolArray, BoolArray]] = keep_all
    """Which pairs the loss trains on, and which of them with chosen and rejected swapped: (keep [P], swap [P]).

    Their safety labels [P, 2] decide, of chosen and rejected: 1 unsafe, 0 safe, -1 unknown (never with
    `Requirements.safety`: there a pair without labels ends the run). An answer takes its label with it."""
    takes: Takes = "pairs"
    """`PairLogProbs` in, `PairLosses` out; with `"groups"` `groups.GroupLogProbs` in, `groups.GroupLosses` out; with
    `"answers"`, labelled ones, `answers.AnswerLogProbs` in, `answers.AnswerLosses` out. A pair is read as two."""
    step_targets: Callable[[Answers, Options], tuple[Tensor, Tensor]] | None = None
    """Of pairs: looks at all of a step before its gradients, detached, [P], for what the loss of each is a function of
    beside its own log-probs: `PairLogProbs.chosen_target` and `rejected_target`, [P] each. Of the pairs it is shown
    lengths and log-probs of policy and reference. It costs a forward pass of the policy per step. Evaluations do
    without."""
    step_shift: Callable[[Answers, Options], Tensor] | None = None
    """Of labelled answers: looks at all of a step before its gradients, detached, [N], for the number that their losses
    share: `AnswerLogProbs.shift`, []. It costs a forward pass of the policy per step. Each evaluation has its own."""
    of_difference: bool = False
    """It reads the reference through `terms.log_ratios` alone, and those in differences of chosen and rejected, so that
    other scores may take their place: it gets the options of `modifiers.ScoreOptions`."""
    jumps: bool = False
    """Its value jumps somewhere near policy == reference, so that the first step's check judges log-probs alone."""
    advise: Callable[[int, int, Options], str | None] | None = None
    """Of labelled answers: what to tell of the numbers of desirable and undesirable ones that are trained on."""

    @property
    def looks_at_steps(self) -> bool:
        """Whether a step has a forward pass of the policy more, for what its losses share."""
        return bool(self.step_targets or self.step_shift)


AnyLossSpec = LossSpec[Any, Any, Any]


@dataclass(frozen=True)
class LossFunction:
    """A loss of the registry with its options."""

    spec: AnyLossSpec
    options: Any

    def describe(self) -> str:
        """Name and options in a line; modifiers where they are set."""
        return ", ".join([self.spec.name, *(f"{name} {value}" for name, value in told(self.options).items())])

    @property
    def requirements(self) -> Requirements:
        """What the loss reads, as configured."""
        return self.spec.requirements(self.options)

    def __call__(self, read: Any) -> Any:
        """The losses of what the loss takes."""
        return self.spec.function(read, self.options)
