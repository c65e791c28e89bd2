"""What planning counts of a model is what its file holds: as many numbers, in every family."""

from __future__ import annotations

import math

import pytest

from megatron_bdpo.model.hf.config import read_config
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters
from tests.harness.tiny_models import MODELS, make_config

pytest.importorskip("transformers", reason="the configurations are made by Hugging Face transformers")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_they_are_stored(name):
    architecture = read_config(make_config(name))
    shapes = architecture.weights.shapes()
    expected = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith("e_score_correction_bias"))
    arguments = {**architecture.arguments, "make_vocab_size_divisible_by": 1}
    model = ModelShape.from_arguments(arguments, architecture.weights.sizes.vocab)
    assert stage_parameters(model, Split(layout=Layout(1, 1, 1)), 0).total == expected
