"""What is of a policy is refused beside --objective reward, and what is of a reward model without it."""

from __future__ import annotations

import pytest

from tests.harness.jobs import refusals

#: Flags -> a part of the refusal; empty: allowed.
LINES = {
    "": "",
    "--objective reward": "",
    "--objective reward --center-rewards-coefficient 0.01": "",
    "--center-rewards-coefficient 0.01": "--center-rewards-coefficient: only for reward models",
    "--rewards out.jsonl": "--rewards: only for reward models",
    "--objective reward --rewards out.jsonl": "--rewards is where megatron-bdpo score writes",
    "--scored-rows out.jsonl": "--scored-rows: only for reward models",
    "--objective reward --scored-rows out.jsonl": "--scored-rows is where megatron-bdpo score writes",
    "--objective reward --preference-loss dpo": "--preference-loss: its loss is Bradley-Terry",
    "--objective reward --beta 0.2 --no-bdpo-weights": "--beta, --bdpo-weights: the options of preference losses",
    "--objective reward --reference resident": "--reference: it is measured against no reference",
    "--objective reward --reference-model M": "--reference-model: it is measured against no reference",
    "--objective reward --reference-cache D": "--reference-cache: it is measured against no reference",
    "--objective reward --no-step-zero-check": "step-zero-check: it is measured against no reference",
    "--objective reward --unconditional-prompt context": "--unconditional-prompt: it is measured against no reference",
    "--objective reward --log-probs plain": "--log-probs: it has no output layer and no log-probs",
    "--objective reward --log-prob-chunk-size 8": "--log-prob-chunk-size: it has no output layer",
    "--objective reward --log-prob-kept-mib 8": "--log-prob-kept-mib: it has no output layer",
    "--objective reward --log-entropy": "--log-entropy: it has no output layer",
    "--objective reward --eval-prompts ask.jsonl --eval-prompt-tokens 8": "--eval-prompts, --eval-prompt-tokens: it",
    "--objective reward --lora-rank 8 --lora-alpha 2": "--lora-rank, --lora-alpha: all of its weights are trained",
    "--objective reward --lora-start D": "--lora-start: all of its weights are trained",
    "--objective reward --save-hf-merged D": "--save-hf-merged: all of its weights are trained",
}


@pytest.fixture(scope="module")
def told(ranks) -> dict[str, str]:
    check = "megatron_bdpo.training.flags.objective_check.check_objective"
    (found,) = ranks(1)(refusals, check, [(line, 1) for line in LINES])
    return dict(zip(LINES, found, strict=True))


@pytest.mark.parametrize("line", LINES)
def test_refused_or_not(told, line):
    assert LINES[line] in told[line] and bool(LINES[line]) == bool(told[line])
