"""How far two recordings of one job are apart."""

from __future__ import annotations

import numpy as np

from tests.harness.recording import Recording, SequenceLogProbs, WholeTensors

Deviations = dict[str, float]


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
