"""The attention backends that this machine has, against each other on a GPU: packing, shared prompts, windows."""

from __future__ import annotations

import pytest
import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.attention_backends import BACKENDS, check_backend
from megatron_bdpo.model.attention_layer import Layer
from tests.unit.model.test_attention import CASES, Case, attend

pytestmark = pytest.mark.gpu

#: Each rounds softmax weights and results to the input's precision; gradients add up to 12 such terms.
UNITS = 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_equals_sdpa(backend, name, dtype):
    case = Case(**{**vars(CASES[name]), "head_size": 64})
    layer = Layer(64, case.scale, case.window, case.value_size, case.softcap, case.sinks != "vanilla")
    try:
        check_backend(backend, True, dtype, layer)
    except UserError as refusal:
        pytest.skip(str(refusal))
    from megatron_bdpo.platform.boot import prepare_platform

    prepare_platform()
    inputs = {name: tensor.to(dtype).double() for name, tensor in case.inputs().items()}
    expected = attend(case, inputs, dtype, device="cuda", backend="sdpa")
    for what, value in attend(case, inputs, dtype, device="cuda", backend=backend).items():
        scale = max(expected[what].abs().max().item(), 1.0) if expected[what].numel() else 1.0
        tolerance = UNITS * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(value, expected[what], rtol=0, atol=tolerance, msg=what)
