"""The parts that are of use without Megatron: what they load, what they compute, and the example made of them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bdpo.data import Group, lay_out
from megatron_bdpo.logprobs import ScoredPositions, fused_log_probs
from tests.harness.huggingface import token_log_probs

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "plain_torch.py"

#: A program in which nothing of Megatron can be imported.
WITHOUT_MEGATRON = "import sys; sys.modules['megatron'] = None\n"


def run(script: str, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_MEGATRON + script, *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("module", "expected_loaded"),
    [("losses", "numpy torch"), ("comprehension", "numpy torch"), ("logprobs", "numpy torch"), ("data", "numpy")],
)
def test_what_is_loaded(module, expected_loaded):
    heavy = ("numpy", "torch", "transformers", "datasets", "safetensors", "click")
    loaded = f"print(*[name for name in {heavy} if name in sys.modules])"
    assert run(f"import megatron_bdpo.{module}; {loaded}").strip() == expected_loaded


def test_the_example_learns():
    """In well under half a minute on a CPU."""
    script = f"import runpy; sys.argv = ['plain_torch.py']; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    output = run(script)
    found = re.search(r"held out: accuracy (\S+), margin (\S+) nats", output)
    assert found and float(found[1]) > 0.9 and float(found[2]) > 1, output


def example():
    spec = importlib.util.spec_from_file_location("plain_torch", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packed_log_probs_are_those_of_single_sequences():
    """Shared prompts and packing, through transformers' own layers by a mask."""
    torch.manual_seed(0)
    model = example().tiny_llama(64).eval()
    rng = np.random.default_rng(0)
    groups = [
        Group(rng.integers(0, 64, prompt, dtype=np.int32), [rng.integers(0, 64, n, dtype=np.int32) for n in answers])
        for prompt, *answers in [(5, 3, 4), (1, 2, 6), (7, 1, 1)]
    ]
    pack = lay_out(groups, 32)  # with padding
    values = example().log_probs(model, pack)
    expected = [token_log_probs(model, group.prompt, answer).sum() for group in groups for answer in group.answers]
    # fp32, sums of up to six log-probs of 4 nats
    np.testing.assert_allclose(values.detach().numpy(), expected, rtol=0, atol=1e-5)


def test_the_whole_vocabulary_is_the_default():
    hidden, weight = torch.randn(3, 1, 8), torch.randn(20, 8)
    scored = ScoredPositions.of([0, 2], [19, 4], [1, 1])
    scores = fused_log_probs(hidden, weight, None, scored, chunk_size=7)
    expected = (hidden[[0, 2], 0] @ weight.t()).log_softmax(-1)[[0, 1], [19, 4]]
    torch.testing.assert_close(scores.log_probs, expected)


def test_scored_positions_that_do_not_fit():
    with pytest.raises(ValueError, match="2 positions, 2 targets, 3 tokens of answers"):
        ScoredPositions.of([0, 1], [5, 6], [3])
