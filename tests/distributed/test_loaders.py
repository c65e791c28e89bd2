"""Virtual stages share their rank's packs: one loader makes them, whose processes are counted, and the values stay."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_bdpo.training.callbacks.callback import Callback, StepResult
from tests.harness.jobs import last_stage, run_job

PP2 = ["--pipeline-model-parallel-size", "2"]
VIRTUAL = [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]
EVALUATIONS = ["--eval-share", "0.25", "--eval-interval", "2"]


@dataclass
class Counted:
    """What a rank has seen."""

    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    processes: set[int]
    """Of loaders, after each step."""
    made: int
    """Packs, in this process."""
    forward: int
    """Passes of a pack through a stage."""


def counted(flags: list[str], **overrides: Any) -> Counted:
    """Run a job on this rank."""
    from megatron_bdpo.training import forward
    from megatron_bdpo.training.batches import PackMaker

    processes: set[int] = set()
    calls: Counter[str] = Counter()

    def counts(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    class Watching(Callback):
        def after_step(self, step: StepResult) -> None:
            processes.add(len(multiprocessing.active_children()))

    with (
        mock.patch.object(PackMaker, "mixed", counts("made", PackMaker.mixed)),
        mock.patch.object(forward, "score_pack", counts("forward", forward.score_pack)),
    ):
        run, _ = run_job(flags, overrides, [Watching()])
    return Counted(run.progress.steps, run.progress.evaluations, processes, calls["made"], calls["forward"])


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_virtual_stages_share_one_loader(ranks, tmp_path: Path, reference):
    """The packs are those of real stages, and of virtual ones without a loader's processes."""
    flags = [*EVALUATIONS, "--reference", reference]
    jobs = {
        "stages": [*PP2, *flags],
        "virtual": [*VIRTUAL, *flags],
        "virtual, workers": [*VIRTUAL, *flags, "--num-workers", "2"],
    }
    found = {
        name: ranks(2)(counted, job, train_iters=4, pair_cache_dir=str(tmp_path / name)) for name, job in jobs.items()
    }
    for outcomes in zip(*found.values(), strict=True):
        stages, virtual, workers = outcomes
        assert stages.processes == virtual.processes == {0}
        assert workers.processes == {2}, "of training, whatever the number of virtual stages; none of evaluations"
        assert virtual.forward * stages.made == 2 * stages.forward * virtual.made, "a pack is made once for both"
        assert virtual.forward == workers.forward and virtual.made > workers.made > 0
    expected = last_stage(found["stages"])
    assert len(expected.steps) == 4 and len(expected.evaluations) == 3
    for name in ("virtual", "virtual, workers"):
        seen = last_stage(found[name])
        for ours, theirs in ((seen.steps, expected.steps), (seen.evaluations, expected.evaluations)):
            for one, other in zip(ours, theirs, strict=True):
                for metric, value in other.items():
                    if not metric.startswith("throughput"):
                        # The same sums: the stages' sizes change no shape, but memory may be aligned otherwise.
                        assert one[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, metric)
