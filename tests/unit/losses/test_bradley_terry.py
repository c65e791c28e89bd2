"""Bradley-Terry against its closed form in float64, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.bradley_terry import BradleyTerryOptions, PairRewards, bradley_terry

CHOSEN, REJECTED, MARGIN = [1.5, -0.25, 40.0, -800.0], [0.25, 1.0, -3.0, 2.0], [0.5, 0.0, 1.0, 3.0]


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("margins", [None, MARGIN])
def test_value_and_gradient(coefficient, margins):
    chosen, rejected = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (CHOSEN, REJECTED))
    margin = None if margins is None else torch.tensor(margins, dtype=torch.float64)
    found = bradley_terry(PairRewards(chosen, rejected, margin), BradleyTerryOptions(coefficient))
    found.loss.sum().backward()
    for row, (w, l) in enumerate(zip(CHOSEN, REJECTED, strict=True)):  # noqa: E741
        z = w - l - (margins[row] if margins else 0.0)
        expected = max(-z, 0.0) + math.log1p(math.exp(-abs(z))) + coefficient * (w + l) ** 2
        assert float(found.loss[row]) == pytest.approx(expected, rel=1e-14, abs=1e-300)
        slope = -math.exp(-z) / (1 + math.exp(-z)) if z > 0 else -1 / (1 + math.exp(z))  # of the first term by z
        assert float(chosen.grad[row]) == pytest.approx(slope + 2 * coefficient * (w + l), rel=1e-12)
        assert float(rejected.grad[row]) == pytest.approx(-slope + 2 * coefficient * (w + l), rel=1e-12)


def test_gradcheck():
    rewards = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    margin = torch.rand(5, dtype=torch.float64)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return bradley_terry(PairRewards(chosen, rejected, margin), BradleyTerryOptions(0.1)).loss

    assert torch.autograd.gradcheck(loss, rewards)


def test_what_is_reported_has_no_gradient():
    chosen, rejected = (torch.tensor(each, requires_grad=True) for each in (CHOSEN, REJECTED))
    found = bradley_terry(PairRewards(chosen, rejected), BradleyTerryOptions())
    assert not any(each.requires_grad for each in (found.chosen_reward, found.rejected_reward, *found.metrics.values()))
    assert found.metrics["rewards/mean"].tolist() == [0.875, 0.375, 18.5, -399.0]


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_coefficient_out_of_range(value):
    with pytest.raises(UserError, match="--center-rewards-coefficient must be at least 0 and at most 10,000, got"):
        BradleyTerryOptions(value)
