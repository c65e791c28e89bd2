"""How often a step makes the host wait, as CUDA itself sees it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.harness.jobs import run_job

pytestmark = pytest.mark.gpu

#: Whether a pair's loss is finite, and one in Megatron's schedule now and then.
MOST_PER_MICROBATCH = 2


def test_a_microbatch_waits_at_most_twice(ranks):
    """Two jobs that differ in the microbatches of a step: what a step does once is left out."""
    few, many = (ranks(1)(synchronisations, length)[0] for length in (2048, 256))
    more = many["microbatches"] - few["microbatches"]
    assert more >= 2
    assert more <= many["waits"] - few["waits"] <= MOST_PER_MICROBATCH * more, (few, many)


def synchronisations(length: int) -> dict[str, Any]:
    """Of the second step: warnings of torch's synchronisation debug mode, and where the first ones were."""
    import torch

    from megatron_bdpo.training.run import PreferenceRun

    seen: dict[str, Any] = {}

    class Counting(PreferenceRun):
        def wrap_schedule(self, schedule: Any) -> Any:
            inner = super().wrap_schedule(schedule)

            def run(*args: Any, **kwargs: Any) -> Any:
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        result = inner(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                waits = [f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
                seen.update(waits=len(waits), places=waits[:20], microbatches=kwargs["num_microbatches"])
                return result

            return run

    flags = ["--bf16", "--hidden-size", "256", "--num-attention-heads", "4", "--seq-length", str(length)]
    run_job([*flags, "--max-prompt-length", "32", "--train-iters", "2"], {}, run_type=Counting)
    return seen
