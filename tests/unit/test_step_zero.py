"""The gate that stops a run whose policy is not its reference at the first step."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Iterator

import torch

from tests.harness.jobs import last_stage, train

LN_2 = math.log(2)

# (dtype, deviation of the loss, log-ratio per token) that rounding explains, and that it does not.
PASSES = [
    (torch.float32, 0.0, 0.0),
    (torch.float32, 0.9e-6, 0.9e-5),
    (torch.float32, -0.9e-6, 0.9e-5),
    (torch.bfloat16, 0.9e-2, 1.9e-2),
    (torch.float16, 1.9e-3, 3.9e-3),
]
STOPS = [
    (torch.float32, 1.1e-6, 0.0),
    (torch.float32, -1.1e-6, 0.0),
    (torch.float32, 0.0, 1.1e-5),
    (torch.bfloat16, 1.1e-2, 0.0),
    (torch.bfloat16, 0.0, 2.1e-2),
    (torch.float16, 2.1e-3, 0.0),
    (torch.float32, math.nan, 0.0),
    (torch.float32, 0.0, math.nan),
]


@contextlib.contextmanager
def process_groups() -> Iterator[None]:
    from megatron_bdpo.training import distributed

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = {
        "distributed_backend": "gloo",
        "fake_process_group": False,
        "distributed_timeout_minutes": 1,
        "rank": rank,
        "world_size": world_size,
    }
    with distributed.process_groups(argparse.Namespace(**settings)):
        yield


def verdict(dtype: torch.dtype, microbatches_by_rank: list[list[tuple[list[float], list[float]]]]) -> str:
    """What the gate says on this rank. A microbatch is (losses, log-ratios per token) of its pairs."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.model.precision import Precision
    from megatron_bdpo.training.step_zero import StepZeroGate

    with process_groups():
        gate = StepZeroGate(Precision(dtype))
        for losses, ratios in microbatches_by_rank[torch.distributed.get_rank()]:
            loss = torch.tensor(losses, dtype=torch.float64)
            gate.observe(loss, torch.full_like(loss, LN_2), torch.tensor(ratios, dtype=torch.float64))
        try:
            return gate.judge()
        except UserError as error:
            return f"stopped: {error}"


def verdicts(cases: list[tuple[torch.dtype, float, float]]) -> list[str]:
    return [verdict(dtype, [[([LN_2 + loss] * 3, [ratio] * 3)]]) for dtype, loss, ratio in cases]


def test_rounding_passes(ranks):
    for case, found in zip(PASSES, ranks(1)(verdicts, PASSES)[0], strict=True):
        assert found.startswith("step 0: policy equals reference, "), (case, found)


def test_more_than_rounding_stops(ranks):
    for case, found in zip(STOPS, ranks(1)(verdicts, STOPS)[0], strict=True):
        assert found.startswith("stopped: step 0: the policy is not its reference: "), (case, found)


def test_message_says_what_was_seen_and_the_ways_out(ranks):
    (found,) = ranks(1)(verdict, torch.float32, [[([LN_2 + 0.25, LN_2 + 0.75], [0.5, 0.0])]])
    assert "loss off by 5.0e-01 (allowed 1e-06), log-ratio 2.5e-01 nats per token (allowed 1e-05)" in found
    assert "delete the reference cache" in found
    assert "--no-step-zero-check" in found


def test_every_pair_of_every_microbatch_and_rank_counts(ranks):
    """Three pairs on one rank, one on the other: a mean over pairs, not over packs or ranks, and the same on both."""
    one, other = [([LN_2, LN_2], [0.0, 0.0]), ([LN_2 + 4], [4.0])], [([LN_2], [0.0])]
    found = ranks(2)(verdict, torch.float32, [one, other])
    assert found[0] == found[1]
    assert "loss off by 1.0e+00 (allowed" in found[0]
    assert "log-ratio 1.0e+00 nats" in found[0]


def test_rank_that_saw_no_pair_takes_part(ranks):
    """Earlier pipeline stages compute no loss, and a pack may be empty."""
    found = ranks(2)(verdict, torch.float32, [[], [([], []), ([LN_2], [0.0])]])
    assert [message.startswith("step 0: policy equals reference") for message in found] == [True, True]


# In a run


def train_with_other_reference(flags: list[str], cache: str) -> list[dict[str, float]] | str:
    """The tiny job with reference values that are off, as those of other weights would be: its steps, or why not."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.reference.scoring import ReferenceTable

    original = ReferenceTable.lookup

    def off(self, batch):
        conditional, unconditional = original(self, batch)
        return conditional - 0.01 * batch.sequence_tokens, unconditional

    ReferenceTable.lookup = off
    try:
        return last_stage([train(flags, pair_cache_dir=cache, max_pairs=16, train_iters=1)]).steps
    except UserError as error:
        return str(error)
    finally:
        ReferenceTable.lookup = original


def test_run_with_another_reference_is_stopped(ranks, tmp_path):
    (message,) = ranks(1)(train_with_other_reference, [], str(tmp_path))
    assert re.search(r"the policy is not its reference: .* log-ratio 1\.0e-02 nats per token", message)


def test_check_can_be_switched_off(ranks, tmp_path):
    (steps,) = ranks(1)(train_with_other_reference, ["--no-step-zero-check"], str(tmp_path))
    assert steps[0]["rewards/chosen"] > 0.01
