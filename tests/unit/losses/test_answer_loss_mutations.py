"""Each loss of labelled answers with a mistake in it, as `test_loss_mutations` makes them of losses of pairs."""

from __future__ import annotations

import ast
import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import LossSpec, answer_terms
from tests.harness.answer_forms import ANSWER_CASES, ANSWER_FORMS, EXTREME, Answer, evaluate, expected, random_answers
from tests.unit.losses.test_loss_mutations import mistakes, run, source, unseen

ANSWERS = random_answers(40, seed=1) + EXTREME
STEPS: list[list[Answer]] = [ANSWERS, random_answers(20, seed=2, drift=-1.0), []]


def is_right(spec: LossSpec, cases: list[dict[str, Any]]) -> bool:
    """Whether loss, gradient and rewards are those of the closed forms, whatever the step; errors are mistakes."""
    return all(agrees(spec, given, step) for given in cases for step in STEPS)


def agrees(spec: LossSpec, given: dict[str, Any], step: list[Answer]) -> bool:
    try:
        loss, gradient, out = evaluate(spec, given, ANSWERS, step)
    except (AssertionError, AttributeError, NameError, RuntimeError, TypeError, ValueError):
        return False
    beta = given.get("beta", 0.1)
    rows = [
        (*found, beta * (a.l - a.r))
        for a, found in zip(ANSWERS, expected(spec.name, given, ANSWERS, step), strict=True)
    ]
    found = torch.stack([loss, gradient, out.reward], 1)
    return torch.allclose(found, torch.tensor(rows, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def cases_of(name: str) -> list[dict[str, Any]]:
    return [given for each, given in ANSWER_CASES if each == name]


def module_of(name: str) -> ModuleType:
    return importlib.import_module(losses.get(name).function.__module__)


@pytest.mark.parametrize("name", sorted(ANSWER_FORMS))
def test_mistake_in_a_loss(name):
    module = module_of(name)
    assert sum(1 for _ in mistakes(module, ast.parse(source(module)))) >= 2
    assert unseen(module, lambda tree: is_right(run(tree, module)["SPEC"], cases_of(name)), ()) == []


def test_mistake_in_a_term():
    """Of what they share: two losses read all of it."""

    def is_as_expected(tree: ast.Module) -> bool:
        mutant = ModuleType(answer_terms.__name__)
        vars(mutant).update(run(tree, answer_terms))
        with mock.patch.dict(sys.modules, {answer_terms.__name__: mutant}):
            specs = [run(ast.parse(source(module_of(name))), module_of(name))["SPEC"] for name in ("bco", "kto")]
        return all(is_right(spec, cases_of(spec.name)) for spec in specs)

    assert unseen(answer_terms, is_as_expected, ()) == []
