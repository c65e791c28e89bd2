"""The step of a loss of labelled answers: what it makes of a pack with a pair, answers of both labels, and a pair."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.data.labels import DESIRABLE, PAIR, UNDESIRABLE
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import LossFunction
from megatron_bdpo.training.answer_step import AnswerStep
from megatron_bdpo.training.batches import PackBatch, PackMaker
from megatron_bdpo.training.forward import ReferenceLogProbs
from tests.unit.training.test_batches import PACK, batch_of

LABEL = np.array([PAIR, DESIRABLE, UNDESIRABLE, PAIR], np.int8)

#: Chosen and rejected among the pack's nine answers; of labelled ones both are one.
ANSWERS = torch.tensor([[2, 0], [1, 1], [8, 8], [5, 7]])

#: Of the sides that are labelled answers, in their order.
READ, IS_DESIRABLE = [2, 0, 1, 8, 5, 7], [True, False, True, False, True, False]
WEIGHT = [0.25, 0.25, 0.5, 0.5, 0.25, 0.25]  # a row is half of a group's, a pair's side half of that


def batch() -> PackBatch:
    made = batch_of(PACK, 32)
    maker = PackMaker(SimpleNamespace(pairs=SimpleNamespace(label=LABEL)), 64)  # type: ignore[arg-type]
    sides = maker._sides(np.arange(4), made.pairs.weight.numpy())
    return dataclasses.replace(made, pairs=dataclasses.replace(made.pairs, answers=ANSWERS, sides=sides))


def step_of(**fields: Any) -> AnswerStep:
    """With a reference that is 1, 2, ... 8 nats below the policy's 0, 1, ... 8, by side."""
    conditional = ANSWERS.double() - torch.arange(1.0, 9.0).reshape(4, 2)
    reference: Any = SimpleNamespace(lookup=lambda batch: ReferenceLogProbs(conditional))
    scoring: Any = SimpleNamespace(apart=lambda scores: (scores, None, None))
    loss = LossFunction(losses.get("apo_zero_unpaired"), losses.build_options("apo_zero_unpaired", {"beta": 1.0}))
    return AnswerStep(loss, reference, scoring, describe="row {}".format, place="step 3", **fields)


def test_each_side_with_its_label_and_weight():
    seen: list[Any] = []
    gate: Any = SimpleNamespace(observe=lambda answers, loss: seen.append(answers))
    made = batch()
    loss_sum, count, _ = step_of(gate=gate)._loss_func(made, torch.arange(9, dtype=torch.float64))
    (answers,) = seen
    assert (answers.policy.tolist(), answers.desirable.tolist()) == (READ, IS_DESIRABLE)
    assert answers.tokens.tolist() == made.answer_tokens[READ].tolist()
    ratios = [1.0, 2, 3, 6, 7, 8]  # of sides 0, 1, 2, 5, 6 and 7
    assert (answers.policy - answers.reference).tolist() == ratios
    signed = torch.tensor([-ratio if good else ratio for ratio, good in zip(ratios, IS_DESIRABLE, strict=True)])
    assert float(loss_sum) == pytest.approx(float((torch.sigmoid(signed) * torch.tensor(WEIGHT)).sum()))
    assert int(count) == made.pairs.count


@pytest.mark.parametrize(("broken", "row"), [(0, 50), (1, 51), (8, 52), (7, 53)])
def test_the_row_whose_loss_is_not_finite_is_named(broken, row):
    policy = torch.arange(9, dtype=torch.float64)
    policy[broken] = torch.nan
    with pytest.raises(UserError, match=f"step 3: the loss of 1 answer is not finite:\n  row {row}: loss nan"):
        step_of()._loss_func(batch(), policy)
