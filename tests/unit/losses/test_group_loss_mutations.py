"""Each loss of groups with a mistake in it, as `test_loss_mutations` makes them of losses of pairs."""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import asdict
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import LossSpec, group_terms
from tests.harness.group_cases import AT_THE_REFERENCE, inputs, random_groups
from tests.harness.group_forms import GROUP_CASES, GROUP_FORMS, expected_rewards, with_nll
from tests.unit.losses.test_loss_mutations import mistakes, run, source, unseen

GROUPS = random_groups(30, seed=1) + AT_THE_REFERENCE
PLACES = max(map(len, GROUPS))

#: Mistakes that change no value that is compared here, and why.
HARMLESS = {
    "below = (score - highest) / alpha  # 0 of the best: never inf - inf  # score - highest with a plus": (
        "a softmax sees no constant; that it does not overflow, test_group_losses sees"
    ),
}


def table(rows: list[list[float]]) -> torch.Tensor:
    """[G, K], zeros where no answer is."""
    return torch.tensor([row + [0.0] * (PLACES - len(row)) for row in rows], dtype=torch.float64)


def is_right(spec: LossSpec, cases: list[dict[str, Any]]) -> bool:
    """Whether loss, gradient and rewards are those of the closed forms; errors are mistakes."""
    for given in cases:
        groups = inputs(GROUPS, torch.float64)
        try:
            found = spec.function(groups, spec.options(**given))
            (gradient,) = torch.autograd.grad(found.loss.sum(), groups.policy)
        except (AssertionError, AttributeError, NameError, RuntimeError, TypeError, ValueError):
            return False
        values = asdict(losses.build_options(spec.name, given))
        weight = values.pop("nll_weight")
        wanted = [with_nll(group, GROUP_FORMS[spec.name](group, **values), weight) for group in GROUPS]
        compared = [
            (found.loss, torch.tensor([loss for loss, _ in wanted], dtype=torch.float64)),
            (gradient, table([slopes for _, slopes in wanted])),
            (found.reward, table([expected_rewards(spec.name, group, values) for group in GROUPS])),
        ]
        if not all(torch.allclose(one, two, rtol=1e-9, atol=1e-12) for one, two in compared):
            return False
    return True


def cases_of(name: str) -> list[dict[str, Any]]:
    return [given for each, given in GROUP_CASES if each == name]


def module_of(name: str) -> ModuleType:
    return importlib.import_module(losses.get(name).function.__module__)


@pytest.mark.parametrize("name", sorted(GROUP_FORMS))
def test_mistake_in_a_loss(name):
    module = module_of(name)
    assert sum(1 for _ in mistakes(module, ast.parse(source(module)))) >= 3
    assert unseen(module, lambda tree: is_right(run(tree, module)["SPEC"], cases_of(name)), HARMLESS) == []


def test_mistake_in_a_term():
    """Of what they share."""

    def is_as_expected(tree: ast.Module) -> bool:
        mutant = ModuleType(group_terms.__name__)
        vars(mutant).update(run(tree, group_terms))
        with mock.patch.dict(sys.modules, {group_terms.__name__: mutant}):
            spec = run(ast.parse(source(module_of("pl_dpo"))), module_of("pl_dpo"))["SPEC"]
        return is_right(spec, cases_of("pl_dpo"))

    assert unseen(group_terms, is_as_expected, HARMLESS) == []
