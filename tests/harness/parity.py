"""How far two recordings of one job are apart."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness.recording import Recording, SequenceLogProbs, WholeTensors

Deviations = dict[str, float]

# Log-probs are sums of some hundred fp32 terms of size 5: their rounding is 1e-7 of the sum. Rewards and margins are
# differences of such sums, times beta 0.1, so they are compared on that scale and not on their own.
RELATIVE = 1e-5
LOG_PROB_SCALE = 500.0
BETA = 0.1


def deviations(found: Recording[WholeTensors], expected: Recording[WholeTensors]) -> Deviations:
    """The largest relative deviation of each quantity from a job on one rank.

    Log-probs relative to the largest one, losses each to itself, gradients and weights per tensor to its largest
    element, which is at least a thousandth of the largest element of all.
    """
    steps = list(zip(found.steps, expected.steps, strict=True))
    return {
        "log-probs": max(_log_probs_off(own, one.sequences[0]) for step, one in steps for own in step.sequences),
        "loss": max(abs(step.metrics["loss"] / one.metrics["loss"] - 1) for step, one in steps),
        "gradients": max(_worst_tensor(step.gradients, one.gradients) for step, one in steps),
        "weights": _worst_tensor(found.weights, expected.weights),
    }


def gradient_distance(found: Recording[WholeTensors], expected: Recording[WholeTensors]) -> float:
    """Length of the difference of the first step's gradients relative to that of the gradient, all tensors as one."""
    ours, theirs = found.steps[0].gradients, expected.steps[0].gradients
    difference = sum(float(np.square(ours[name] - value).sum()) for name, value in theirs.items())
    return (difference / sum(float(np.square(value).sum()) for value in theirs.values())) ** 0.5


def beyond(found: Deviations, allowed: Deviations) -> Deviations:
    """The quantities that are off by more than allowed; a NaN is."""
    return {name: value for name, value in found.items() if not value <= allowed[name]}


def _log_probs_off(own: SequenceLogProbs, expected: SequenceLogProbs) -> float:
    """Of the pairs that one rank has."""
    assert own.keys() <= expected.keys(), "other pairs in this step"
    largest = max(np.abs(values).max() for values in expected.values())
    return float(max(_off(values, expected[pair]) for pair, values in own.items()) / largest)


def _worst_tensor(found: WholeTensors, expected: WholeTensors) -> float:
    assert found.keys() == expected.keys()
    scales = {name: float(np.abs(value).max()) for name, value in expected.items()}
    floor = max(scales.values()) / 1000
    return max(_off(found[name], value) / max(scales[name], floor) for name, value in expected.items())


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0))


def assert_same_steps(steps: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """All metrics of all steps, but for the speed."""
    assert [step["iteration"] for step in steps] == [step["iteration"] for step in expected]
    for step, expected_step in zip(steps, expected, strict=True):
        assert step.keys() == expected_step.keys()
        for name, expected_value in expected_step.items():
            if not name.startswith("throughput"):
                scale = BETA * LOG_PROB_SCALE if name.startswith("rewards") else max(1.0, abs(expected_value))
                close = pytest.approx(expected_value, abs=RELATIVE * scale)
                assert step[name] == close, f"{name} at {step['iteration']}"


def assert_same_weights(weights: WholeTensors, expected: WholeTensors) -> None:
    """After steps of Adam with its usual epsilon and a learning rate of 1e-3."""
    assert weights.keys() == expected.keys()
    for name, expected_value in expected.items():
        # Adam divides by the root of the second moment: where a gradient is near zero its sign is rounding, and the
        # weight moves by up to the learning rate either way. Such elements are few.
        off = np.abs(weights[name] - expected_value) > 1e-5
        assert off.mean() < 1e-3, f"{name}: {off.mean():.2%} of the elements differ"
