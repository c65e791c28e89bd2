"""What a run needs on its disk: as a checkpoint that is written, and refused where there is less."""

from __future__ import annotations

import re

import pytest

from tests.distributed.test_bad_input import refusal
from tests.harness.jobs import train
from tests.reliability.test_disk import disk  # noqa: F401  # a fixture

#: Large enough that what is beside tensors is little.
WIDER = {"hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 2, "train_iters": 1, "save_interval": 1}


def estimated_and_written(flags, save):
    """Bytes of a checkpoint by arithmetic, and in the directory."""
    from megatron_bdpo.planning.storage import checkpoint_bytes
    from megatron_bdpo.training import run as module
    from megatron_bdpo.training.job_memory import job_shape, model_shape

    found = []
    original = module.PreferenceRun.pretrain

    def pretrain(self):
        found.append(checkpoint_bytes(model_shape(self.arguments), job_shape(self.settings, self.job)))
        original(self)

    module.PreferenceRun.pretrain = pretrain
    try:
        train([*flags, "--save", str(save)], **WIDER)
    finally:
        module.PreferenceRun.pretrain = original
    return found[0], sum(path.stat().st_size for path in (save / "iter_0000001").iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--bf16"],
        ["--use-distributed-optimizer"],
        ["--bf16", "--use-distributed-optimizer"],
        ["--tensor-model-parallel-size", "2"],
        ["--bf16", "--pipeline-model-parallel-size", "2"],
        ["--bf16", "--use-distributed-optimizer", "--num-experts", "2", "--moe-token-dispatcher-type", "alltoall"],
        ["--bf16", "--lora-rank", "256"],
    ],
    ids=" ".join,
)
def test_a_checkpoint_is_as_large_as_is_said(ranks, tmp_path, flags):
    estimated, written = ranks(2)(estimated_and_written, flags, tmp_path)[0]
    assert written == pytest.approx(estimated, rel=0.03)


@pytest.mark.parametrize(
    ("saves", "expected"),
    [
        ({"steps": 100, "interval": 10}, 10),
        ({"steps": 95, "interval": 10}, 10),
        ({"steps": 100, "interval": 10, "newest": 2}, 3),
        ({"steps": 100, "interval": 10, "newest": 2, "every": 50}, 3),
        ({"steps": 100, "interval": 10, "newest": 2, "every": 20}, 6),
        ({"steps": 10, "interval": 10, "newest": 2}, 1),
        ({"steps": 100, "interval": None, "newest": 2}, 3),
        ({"steps": 100, "interval": None}, None),
    ],
)
def test_checkpoints_at_the_fullest_moment(saves, expected):
    from megatron_bdpo.planning.storage import Saves

    assert Saves(**saves).most_at_once() == expected
    assert Saves(**saves).most_at_once(done=saves["steps"]) == 0


def test_a_start_on_a_disk_that_is_too_small_is_refused(ranks, disk):  # noqa: F811
    """8 MiB; a checkpoint takes 2.6 MB, of which all stay."""
    flags = ["--num-layers", "2", "--save", str(disk / "run"), "--save-interval", "1", "--train-iters"]
    messages = ranks(2)(refusal, [*flags, "6"], hidden_size=64)
    assert len(set(messages)) == 1
    expected = r"run: the disk has 8\.\d MB left, and the run needs checkpoints \(6 of 2\.\d MB\) 13\.\d MB"
    assert re.search(expected, messages[0]), messages[0]
    assert not list((disk / "run").glob("*.yaml"))
    outcomes = ranks(2)(train, [*flags, "6", "--keep-checkpoints", "1"], hidden_size=64)
    assert len(outcomes[-1].steps) == 6
