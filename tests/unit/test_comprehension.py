"""Mutual information, balanced weights and gradient scale against plain-Python closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bdpo.comprehension import (
    automatic_temperature,
    balanced_weights,
    gradient_scale,
    list_scale,
    list_weights,
    mutual_information,
    quantiles,
)

DTYPES = [torch.float32, torch.float64]
INFORMATION = st.floats(-1e3, 1e3)
TEMPERATURE = st.floats(1e-2, 1e3)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_information_is_the_log_ratio_per_token(dtype):
    conditional, unconditional = torch.tensor([-8.0, -30.0, -2.0], dtype=dtype), torch.tensor([-20.0, -10.0, -2.0])
    tokens = torch.tensor([4, 10, 1])

    expected_per_token = torch.tensor([3.0, -2.0, 0.0], dtype=dtype)  # exact in binary
    expected_sum = torch.tensor([12.0, -20.0, 0.0], dtype=dtype)

    unconditional = unconditional.to(dtype)
    assert torch.equal(mutual_information(conditional, unconditional, tokens), expected_per_token)
    assert torch.equal(mutual_information(conditional, unconditional, tokens, per_token=False), expected_sum)


@given(i_w=INFORMATION, i_l=INFORMATION, tau=TEMPERATURE)
def test_weights_are_twice_the_softmax_of_minus_information(i_w, i_l, tau):
    difference = max(-700.0, min(700.0, (i_w - i_l) / tau))  # exp overflows at 709; the weights are 0 and 2 long before
    expected_w = 2 / (1 + math.exp(difference))
    expected_l = 2 / (1 + math.exp(-difference))

    w_w, w_l = balanced_weights(doubles(i_w), doubles(i_l), tau)

    # |I| / tau reaches 1e5, so its rounding is 1e-11: the relative error of an exponential of it.
    assert w_w.item() == pytest.approx(expected_w, rel=1e-10, abs=1e-30)
    assert w_l.item() == pytest.approx(expected_l, rel=1e-10, abs=1e-30)
    assert (w_w + w_l).item() == pytest.approx(2.0, rel=1e-15)


def test_the_better_understood_response_weighs_less():
    w_w, w_l = balanced_weights(doubles(2.0, 0.5), doubles(0.5, 2.0), 1.0)
    assert (w_w < w_l).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e-3, 1.0, math.inf])
def test_equal_information_weighs_exactly_one(dtype, tau):
    information = torch.linspace(-50, 50, 1001, dtype=dtype)
    for weight in balanced_weights(information, information.clone(), tau):
        assert torch.equal(weight, torch.ones_like(information))


def test_a_quotient_beyond_the_largest_number_is_no_weight_or_all_of_it():
    """Where the softmax of -[I_w, I_l] / tau would be inf - inf."""
    w_w, w_l = balanced_weights(torch.tensor([1e36, 2e36]), torch.tensor([2e36, 1e36]), 1e-4)
    assert (w_w.tolist(), w_l.tolist()) == ([2.0, 0.0], [0.0, 2.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_temperature_weighs_exactly_one(dtype):
    i_w, i_l = torch.randn(2, 1001, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 100
    for weight in balanced_weights(i_w, i_l, math.inf):
        assert torch.equal(weight, torch.ones_like(i_w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_exactly_one_for_plain_dpo_weights(dtype):
    ones = torch.ones(7, dtype=dtype)
    assert torch.equal(gradient_scale(ones, ones), ones)


@given(w_w=st.floats(0, 2))
def test_scale_gives_the_weights_the_norm_of_plain_dpo(w_w):
    w_l = 2 - w_w
    scale = gradient_scale(doubles(w_w), doubles(w_l)).item()

    expected_norm = math.sqrt(2)
    assert scale * math.hypot(w_w, w_l) == pytest.approx(expected_norm, rel=1e-14)
    assert 1 / math.sqrt(2) - 1e-15 <= scale <= 1


def test_nothing_carries_a_gradient():
    log_probs = doubles(-3.0, -4.0).requires_grad_()
    information = mutual_information(log_probs, 2 * log_probs, torch.tensor([2, 3]))
    w_w, w_l = balanced_weights(log_probs, 2 * log_probs, 1.0)
    scale = gradient_scale(2 * log_probs, log_probs)
    assert not any(tensor.requires_grad for tensor in (information, w_w, w_l, scale))


def test_no_pairs():
    empty = torch.empty(0)
    assert mutual_information(empty, empty, empty.long()).shape == (0,)
    assert [weight.shape for weight in balanced_weights(empty, empty, 1.0)] == [(0,), (0,)]
    assert gradient_scale(empty, empty).shape == (0,)


# The temperature that follows from a data set


def test_automatic_temperature_keeps_nine_of_ten_pairs_within_a_half_and_three_halves():
    generator = torch.Generator().manual_seed(3)
    i_w, i_l = torch.randn(2, 100_000, dtype=torch.float64, generator=generator)
    w_w, w_l = balanced_weights(i_w, i_l, automatic_temperature(i_w, i_l))
    within = (torch.maximum(w_w, w_l) <= 1.5) & (torch.minimum(w_w, w_l) >= 0.5)
    assert within.double().mean().item() == pytest.approx(0.9, abs=1e-4)


@given(scale=st.floats(1e-3, 1e3))
def test_automatic_temperature_has_the_unit_of_the_information(scale):
    """Nats or bits, per token or summed: the weights are the same."""
    i_w, i_l = doubles(0.1, 0.5, -0.2, 2.0), doubles(0.3, 0.1, 0.4, 0.1)
    expected = scale * automatic_temperature(i_w, i_l)
    assert automatic_temperature(scale * i_w, scale * i_l) == pytest.approx(expected, rel=1e-12)


def test_automatic_temperature_does_not_see_a_few_extreme_pairs():
    i_w = torch.linspace(0, 1, 1001, dtype=torch.float64)
    extreme = i_w.clone()
    extreme[-20:] *= 1e6
    zeros = torch.zeros_like(i_w)
    assert automatic_temperature(extreme, zeros) == automatic_temperature(i_w, zeros)
    assert automatic_temperature(i_w, zeros) == pytest.approx(0.9 / math.log(3))


def test_automatic_temperature_of_balanced_pairs_is_zero():
    information = torch.linspace(-3, 3, 50)
    assert automatic_temperature(information, information) == 0


SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)


@given(st.lists(st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0, math.nan]), min_size=1, max_size=60))
def test_quantiles_are_torchs_to_the_bit(values):
    expected = torch.quantile(doubles(*values), torch.tensor(SHARES, dtype=torch.float64))
    assert torch.equal(quantiles(doubles(*values), SHARES).nan_to_num(7), expected.nan_to_num(7))


def test_quantiles_of_many_values_are_torchs_to_the_bit():
    for count in (4096, 99_999):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
        expected = torch.quantile(values, torch.tensor(SHARES, dtype=torch.float64))
        assert torch.equal(quantiles(values, SHARES), expected)


def test_more_pairs_than_torch_has_quantiles_for():
    """The values are 0 to n - 1, so a quantile is its own rank."""
    count = 2**24 + 2
    values = torch.arange(count, dtype=torch.float64).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    assert quantiles(values, [0, 0.25, 1]).tolist() == [0, 0.25 * (count - 1), count - 1]
    tau = automatic_temperature(values, torch.zeros_like(values))
    assert tau == pytest.approx(0.9 * (count - 1) / math.log(3), rel=1e-15)


@given(
    information=st.lists(st.floats(-30, 30), min_size=1, max_size=6), absent=st.integers(0, 3), tau=st.floats(0.1, 1e3)
)
def test_weights_of_a_list_are_its_softmax_times_their_number(information, absent, tau):
    k = len(information)
    parts = [math.exp((min(information) - each) / tau) for each in information]
    expected = [k * part / sum(parts) for part in parts]
    expected_scale = math.sqrt(k) / math.hypot(*expected)

    present = torch.tensor([True] * k + [False] * absent)
    weights = list_weights(doubles(*information, *[-1e30] * absent), present, tau)

    assert weights.tolist() == pytest.approx([*expected, *[0.0] * absent], rel=1e-11, abs=1e-300)
    assert list_scale(weights, present).item() == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_a_list_stay_finite(dtype):
    """Where the quotient by the temperature is beyond the largest number."""
    information = torch.tensor([1e36, -1e36, 0.0, 3.0], dtype=dtype)
    weights = list_weights(information, torch.tensor([True, True, True, False]), 1e-4)
    assert weights.tolist() == [0, 3, 0, 0]
    assert list_scale(weights, torch.ones(4, dtype=torch.bool)).item() == pytest.approx(2 / 3)
