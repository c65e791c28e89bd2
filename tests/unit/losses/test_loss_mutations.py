"""Each loss with a mistake in it: a wrong sign, an option that is not read, one answer in the place of the other.

Every such mistake that can be made at one place of a loss's code, of the terms that losses share and of their modifiers
is made, and the closed forms of loss, gradient and rewards have to see it.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import LossSpec, modifiers, terms
from tests.harness.closed_forms import CASES, expected_rewards
from tests.harness.loss_cases import MODIFIERS, expected, inputs, random_pairs, with_targets

#: Some with an unsafe chosen answer, which `select` would have swapped: the loss takes what it is given.
PAIRS = [p._replace(h_w=row % 2) for row, p in enumerate(random_pairs(40, seed=1))]

#: What a function returns that computes a part of a loss.
COMPUTES = re.compile(r"Tensor|(Pair|Group|Answer)(Losses|LogProbs)")

#: The end of a name that is one answer's -> that of the other's.
ANSWERS = {"chosen": "rejected", "rejected": "chosen", "_w": "_l", "_l": "_w"}
ANSWERS |= {"undesirable": "desirable", "desirable": "undesirable"}

DEFAULTS = SimpleNamespace(
    **{name: next(iter(each.defaults.values())) for name, each in losses.option_fields().items()}
)

#: Mistakes that change no value that is compared here, and why.
HARMLESS = {
    "w_w = w_l = s = torch.ones_like(delta_w)  # delta_l": "of both the shape is the same",
    'h_w = required(pairs.chosen_unsafe, "chosen_unsafe").to(delta_w.dtype)  # delta_l': "so is the type",
    'h_l = required(pairs.rejected_unsafe, "rejected_unsafe").to(delta_l.dtype)  # delta_w': "so is the type",
    "m = m.clamp(max=-torch.finfo(m.dtype).eps)  # -torch.finfo(m.dtype).eps with a plus": "test_losses has it",
    "if pairs.chosen_score is not None:  # rejected_score": "there are both or none",
    "if pairs.reference_chosen is None:  # reference_rejected": "there are both or none",
}


# Mistakes ------------------------------------------------------------------------------------------------------------


def mistakes(module: ModuleType, tree: ast.Module) -> Iterator[str]:
    """Makes one mistake after the other in the module's tree, and takes it back; tells the line and what is there."""
    lines = source(module).splitlines()
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and COMPUTES.search(ast.unparse(function.returns or ast.Constant(0))):
            told = {id(below) for each in ast.walk(function) if isinstance(each, ast.Dict) for below in ast.walk(each)}
            names = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
            for node in ast.walk(function):
                if id(node) not in told:  # metrics
                    line = lines[getattr(node, "lineno", 1) - 1].strip()
                    for what in mistakes_at(node, names):
                        yield f"{line}  # {what}"


def mistakes_at(node: ast.AST, names: set[str]) -> Iterator[str]:
    """The mistakes that can be made at a place of a function with these names."""
    match node:
        case ast.BinOp(op=ast.Add()):
            yield from changed(node, "op", ast.Sub(), f"{ast.unparse(node)} with a minus")
        case ast.BinOp(op=ast.Sub()):
            yield from changed(node, "op", ast.Add(), f"{ast.unparse(node)} with a plus")
        case ast.UnaryOp(op=ast.USub()):
            yield from changed(node, "op", ast.UAdd(), f"{ast.unparse(node)} with a plus")
        case ast.Name(id=name, ctx=ast.Load()) if (other := of_the_other(name)) in names:
            yield from changed(node, "id", other, f"{other}")
        case ast.Attribute(value=ast.Name(id="options"), attr=name) if name in losses.option_fields():
            yield from changed(node, "value", ast.Name("DEFAULTS", ast.Load()), f"{name} as by default")
            if (other := of_the_other(name)) is not None:
                yield from changed(node, "attr", other, other)
        case ast.Attribute(attr=name) if (other := of_the_other(name)) is not None:
            yield from changed(node, "attr", other, other)


def of_the_other(name: str) -> str | None:
    """The name of the same of the other answer."""
    found = re.search("|".join(f"{end}(?=$|_score$|_tokens$|_unsafe$|_weight$|_beginning$)" for end in ANSWERS), name)
    return None if found is None else name[: found.start()] + ANSWERS[found[0]] + name[found.end() :]


def changed(node: Any, field: str, value: Any, what: str) -> Iterator[str]:
    before = getattr(node, field)
    setattr(node, field, value)
    yield what
    setattr(node, field, before)


# Whether they are seen -----------------------------------------------------------------------------------------------


def run(tree: ast.Module, module: ModuleType) -> dict[str, Any]:
    """The names of a module that is this tree; its dataclasses find their types in the one that is imported."""
    names: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__, "DEFAULTS": DEFAULTS}
    exec(compile(ast.fix_missing_locations(tree), module.__name__, "exec", dont_inherit=True), names)
    return names


def is_right(spec: LossSpec, cases: list[dict[str, Any]]) -> bool:
    """Whether the losses are those of the closed forms. One that looks at steps is DPO where there is none."""
    alone = ["dpo"] if spec.step_targets else []
    return all(agrees(spec, given, name) for given in cases for name in (spec.name, *alone))


def agrees(spec: LossSpec, given: dict[str, Any], name: str) -> bool:
    """Whether loss, gradient and, without modifiers, rewards are those of a closed form; errors are mistakes."""
    pairs = inputs(PAIRS, torch.float64)
    try:
        options = spec.options(**given)
        found = spec.function(with_targets(spec, pairs, options) if name == spec.name else pairs, options)
        gradient = torch.autograd.grad(found.loss.sum(), (pairs.policy_chosen, pairs.policy_rejected))
    except (AssertionError, AttributeError, NameError, RuntimeError, TypeError, ValueError):
        return False
    wanted, own = [*expected(name, given, PAIRS)], [found.loss, *gradient]
    if not MODIFIERS & given.keys():
        values = vars(losses.build_options(name, given))
        rewards = [expected_rewards(name, p, values) for p in PAIRS]
        wanted += torch.tensor(rewards, dtype=torch.float64).unbind(1)
        own += [found.chosen_reward, found.rejected_reward]
    return all(torch.allclose(one, two, rtol=1e-9, atol=1e-12) for one, two in zip(own, wanted, strict=True))


def cases_of(name: str, *, modified: bool) -> list[dict[str, Any]]:
    return [given for each, given in CASES if each == name and (modified or not MODIFIERS & given.keys())]


def source(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text("utf-8")


def unseen(
    module: ModuleType, is_as_expected: Callable[[ast.Module], bool], harmless: Container[str] = tuple(HARMLESS)
) -> list[str]:
    """Mistakes in a module that change nothing, beside those that cannot."""
    tree = ast.parse(source(module))
    assert is_as_expected(tree)
    return [what for what in mistakes(module, tree) if is_as_expected(tree) and what not in harmless]


LOSS_MODULES = sorted({losses.get(name).function.__module__ for name, _ in CASES})


@pytest.mark.parametrize("module_name", LOSS_MODULES)
def test_mistake_in_a_loss(module_name):
    module = importlib.import_module(module_name)

    def is_as_expected(tree: ast.Module) -> bool:
        specs = [each for each in run(tree, module).values() if isinstance(each, LossSpec)]
        return all(is_right(spec, cases_of(spec.name, modified=False)) for spec in specs)

    assert unseen(module, is_as_expected) == []


def test_mistake_in_a_term():
    """Three losses read all of them."""

    def is_as_expected(tree: ast.Module) -> bool:
        mutant = ModuleType(terms.__name__)
        vars(mutant).update(run(tree, terms))
        for name in ("dpo", "simpo", "sft"):
            module = importlib.import_module(f"megatron_bdpo.losses.{name}")
            with mock.patch.dict(sys.modules, {terms.__name__: mutant}):
                spec = run(ast.parse(source(module)), module)["SPEC"]
            if not is_right(modifiers.modified(spec), cases_of(name, modified=True)):
                return False
        return True

    assert unseen(terms, is_as_expected) == []


def test_mistake_in_a_modifier():
    module = importlib.import_module("megatron_bdpo.losses.dpo")

    def is_as_expected(tree: ast.Module) -> bool:
        spec = run(tree, modifiers)["modified"](module.SPEC)
        return is_right(spec, cases_of("dpo", modified=True))

    assert unseen(modifiers, is_as_expected) == []


def test_mistakes_are_made():
    """As many as there is to mistake: a loss of which none is made would pass."""
    module = importlib.import_module("megatron_bdpo.losses.dpo")
    tree = ast.parse(source(module))
    before = ast.dump(tree)
    made = [what.partition("  # ") for what in mistakes(module, tree)]
    assert ast.dump(tree) == before
    z = "z = options.beta * (delta_w - delta_l)"
    assert {what for line, _, what in made if line == z} == {
        "delta_w - delta_l with a plus",
        "beta as by default",
        "delta_l",
        "delta_w",
    }
    for module_name in LOSS_MODULES:
        module = importlib.import_module(module_name)
        assert sum(1 for _ in mistakes(module, ast.parse(source(module)))) >= 3, module_name
