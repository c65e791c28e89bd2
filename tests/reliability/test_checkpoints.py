"""What may happen to a checkpoint on its disk: found out before it is used, named, and the one before it used."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.distributed.test_bad_input import refusal
from tests.distributed.test_resume import assert_bit_identical
from tests.harness.jobs import last_stage, train

JOB = ["--train-iters", "4", "--save-interval", "2", "--num-layers", "2"]
TRACKER = "latest_checkpointed_iteration.txt"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-7])


def remove(path):
    path.unlink()


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    """A run of four steps with checkpoints of the second and the fourth, and what its two ranks have seen."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    layout = ["--tensor-model-parallel-size", "2", "--save", str(directory)]
    return directory, ranks(2)(train, [*JOB, *layout])


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy to be damaged, and the flags that resume it."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    return run, [*JOB, "--tensor-model-parallel-size", "2", "--save", str(run), "--load", str(run)]


def files(checkpoint):
    return sorted(path.name for path in checkpoint.iterdir())


def test_the_manifest_holds_every_file_and_is_megatrons(finished):
    from megatron.core.dist_checkpointing.validation import _verify_integrity_manifest_impl

    checkpoint = finished[0] / "iter_0000004"
    manifest = json.loads((checkpoint / "integrity.json").read_text())
    assert sorted([*manifest["files"], "integrity.json"]) == files(checkpoint)
    assert "__1_0.distcp" in manifest["files"], "the second rank's file, by the second rank"
    _verify_integrity_manifest_impl(str(checkpoint))


@pytest.mark.parametrize("spoil", [flip_a_bit, cut_short, remove])
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "metadata.json", "integrity.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(ranks, finished, damaged, capfd, spoil, name):
    if (spoil, name) == (remove, "integrity.json"):
        pytest.skip("without a manifest there is nothing to compare: taken as it is")
    run, flags = damaged
    spoil(run / "iter_0000004" / name)
    resumed = ranks(2)(train, flags)
    assert [step["iteration"] for step in last_stage(resumed).steps] == [3, 4]
    assert_bit_identical(finished[1], resumed)


def test_what_is_said_of_it(ranks, damaged):
    run, flags = damaged
    for checkpoint in ("iter_0000002", "iter_0000004"):
        flip_a_bit(run / checkpoint / "__0_0.distcp")
    messages = ranks(2)(refusal, flags)
    assert len(set(messages)) == 1
    expected = r"no checkpoint in it that is whole.*4/__0_0\.distcp is not what was written.*2/__0_0\.distcp is not"
    assert re.search(expected, messages[0], re.DOTALL), messages[0]


@pytest.mark.parametrize("tracker", ["", "garbage"])
def test_a_tracker_that_was_cut_short(ranks, damaged, tracker):
    """Megatron opens it for writing, then writes: in between it is empty."""
    run, flags = damaged
    (run / TRACKER).write_text(tracker)
    assert last_stage(ranks(2)(train, [*flags, "--train-iters", "4"])).steps == []
    assert (run / TRACKER).read_text() == "4"


def test_a_half_written_checkpoint_is_not_taken_for_one(ranks, finished, damaged):
    """Killed while the fourth step's files were written: the tracker names the second."""
    run, flags = damaged
    (run / TRACKER).write_text("2")
    for name in ("metadata.json", ".metadata", "integrity.json"):
        (run / "iter_0000004" / name).unlink()
    cut_short(run / "iter_0000004" / "__0_0.distcp")
    assert_bit_identical(finished[1], ranks(2)(train, flags))
    assert (run / TRACKER).read_text() == "4"


@pytest.mark.parametrize("flags", [["--pretrained-checkpoint", "RUN"], ["--load", "RUN", "--finetune"]])
def test_weights_to_start_from_are_refused_when_damaged(ranks, damaged, flags):
    """There, older weights would be other weights."""
    run, _ = damaged
    flip_a_bit(run / "iter_0000004" / "__0_0.distcp")
    messages = ranks(2)(refusal, ["--num-layers", "2", *(str(run) if flag == "RUN" else flag for flag in flags)])
    assert re.search(r"its checkpoint is damaged:.*__0_0\.distcp is not what was written", messages[0], re.DOTALL)


def test_without_checksums_as_before(ranks, tmp_path):
    flags = [*JOB, "--save", str(tmp_path), "--load", str(tmp_path), "--no-checkpoint-checksums"]
    ranks(2)(train, [*flags, "--exit-interval", "2"])
    assert "integrity.json" not in files(tmp_path / "iter_0000002")
    assert [step["iteration"] for step in last_stage(ranks(2)(train, flags)).steps] == [3, 4]
