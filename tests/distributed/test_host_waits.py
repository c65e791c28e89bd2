"""How often the host waits for the device in a step: what it cannot launch ahead, a GPU stands still for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.jobs import run_job

#: Whether a pair's loss is finite, before its gradient reaches other stages.
OURS = 1
#: Megatron's vocabulary-parallel cross entropy writes through two masks.
PLAIN = 2

#: What a step of labelled answers shares: log-probs of four packs come to the host at a time, which counts as three.
LOOKING = 0.75

JOBS = {
    "dpo": ["--preference-loss", "dpo"],
    "bdpo, with quartiles": ["--preference-loss", "bdpo"],
    "entropy": ["--preference-loss", "dpo", "--log-entropy"],
    "weights of pairs": ["--preference-loss", "dpo", "--use-weighting"],
    "another divergence": ["--preference-loss", "dpo", "--f-divergence", "forward_kl"],
    "sorted steps": ["--preference-loss", "aot"],
    "labelled answers": ["--preference-loss", "kto"],
    "resident": ["--preference-loss", "bdpo", "--reference", "resident"],
    "plain log-probs": ["--preference-loss", "dpo", "--log-probs", "plain"],
}


@pytest.mark.parametrize("name", JOBS)
def test_a_microbatch_waits_once(ranks, name):
    """Two jobs that differ in the microbatches of a step: what a step does once is left out."""
    few, many = (ranks(1)(waits_of_a_step, JOBS[name], length)[0] for length in (2048, 256))
    more = many["microbatches"] - few["microbatches"]
    assert more >= 2
    waits = {place: count - few["places"].get(place, 0) for place, count in many["places"].items()}
    told = "\n".join(f"{count / more:.2f} {place}" for place, count in sorted(waits.items(), key=lambda each: -each[1]))
    others = {"plain log-probs": PLAIN, "labelled answers": LOOKING}.get(name, 0)
    assert sum(waits.values()) <= (OURS + others) * more, told


def waits_of_a_step(flags: list[str], length: int) -> dict[str, Any]:
    """Of the second step, whose functions have all been compiled and whose tables are there."""
    from megatron_bdpo.training.run import PreferenceRun
    from tests.harness.waiting import HostWaits

    seen: dict[str, Any] = {}

    class Counting(PreferenceRun):
        def wrap_schedule(self, schedule: Any) -> Any:
            inner = super().wrap_schedule(schedule)

            def run(*args: Any, **kwargs: Any) -> Any:
                with HostWaits() as waits:
                    result = inner(*args, **kwargs)
                seen.update(places=dict(waits.places), microbatches=kwargs["num_microbatches"])
                return result

            return run

    run_job(
        [*flags, "--seq-length", str(length), "--max-prompt-length", "32", "--train-iters", "2"], {}, run_type=Counting
    )
    return seen


def test_there_is_something_to_count():
    import torch

    from tests.harness.waiting import HostWaits

    with HostWaits() as waits:
        ones = torch.ones(3)
        ones.new_tensor(1.0)
        assert bool(ones.all())
        ones.to("cpu")
        ones[ones > 0]
        ones.to("cpu", non_blocking=True)
        torch.tensor(1.0)
    assert sum(waits.places.values()) == 4
