"""Old checkpoints go, the newest whole one never does: whatever is killed, half written, or still being written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.test_resume import assert_bit_identical
from tests.harness.jobs import train
from tests.harness.moments import start
from tests.harness.ranks import start_server
from tests.reliability.test_async_save import ASYNC


def checkpoint(root: Path, iteration: int, *, whole: bool = True) -> Path:
    """A directory that looks like one, of a few files."""
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    names = ["__0_0.distcp", "__1_0.distcp", ".metadata", *(["metadata.json"] if whole else [])]
    for each in names:
        (directory / each).write_text("x")
    if whole:
        files = dict.fromkeys(names, hashlib.sha256(b"x").hexdigest())
        (directory / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    return directory


def name(root: Path, iteration: object) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def left(root: Path) -> list[int]:
    """Iterations whose directories are there."""
    return sorted(int(found[1]) for path in root.iterdir() if (found := re.fullmatch(r"iter_(\d{7})", path.name)))


def outdated(root: Path, newest: int, every: int | None = None) -> list[int]:
    from megatron_bdpo.training.callbacks.retention import Retention
    from megatron_bdpo.training.checkpoints import iteration_of

    return sorted(iteration_of(path) or 0 for path in Retention(newest, every).outdated(root))


@pytest.mark.parametrize(
    ("newest", "every", "expected_gone"),
    [
        (1, None, [10, 20, 30, 40, 50]),
        (2, None, [10, 20, 30, 40]),
        (1, 20, [10, 30, 50]),
        (2, 30, [10, 20, 40]),
        (10, None, []),
    ],
)
def test_what_goes(ranks, tmp_path, newest, every, expected_gone):
    """The seventh is being written: the tracker names the sixth."""
    for iteration in range(10, 80, 10):
        checkpoint(tmp_path, iteration, whole=iteration < 70)
    name(tmp_path, 60)
    assert ranks(1)(outdated, tmp_path, newest, every) == [expected_gone]


@pytest.mark.parametrize("tracker", ["", "release", "80", "50", None])
def test_without_a_whole_checkpoint_that_is_named_all_stay(ranks, tmp_path, tracker):
    for iteration in (10, 20, 30, 40):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 50, whole=False)
    if tracker is not None:
        name(tmp_path, tracker)
    assert ranks(1)(outdated, tmp_path, 1) == [[]]


def save_a_fifth(root: Path, goes_on_from: int | None) -> None:
    from megatron_bdpo.training.callbacks.retention import Deletion, Retention

    deletion = Deletion(Retention(2), root, lambda: False, goes_on_in_place=True)
    deletion.after_load(start(goes_on_from or 0))
    deletion.after_files(checkpoint(root, 50))
    name(root, 50)
    deletion.finished()


def test_what_is_not_whole_does_not_count(ranks, tmp_path):
    """A run begins at 20: 30 is of a killed save, 40 was found damaged. The newest behind 50 that is whole is 20."""
    for iteration in (10, 20, 30, 40):
        checkpoint(tmp_path, iteration, whole=iteration != 30)
    name(tmp_path, 20)
    ranks(1)(save_a_fifth, tmp_path, 20)
    assert left(tmp_path) == [20, 50]


def test_another_continuation_does_not_count(ranks, tmp_path):
    """A run goes on from 20 although the tracker is at 45: it keeps its own start, not what the other one has left."""
    for iteration in (10, 20, 30, 45):
        checkpoint(tmp_path, iteration)
    name(tmp_path, 45)
    ranks(1)(save_a_fifth, tmp_path, 20)
    assert left(tmp_path) == [20, 50]


@pytest.mark.parametrize("tracker", ["release", "", "40", None])
def test_what_a_new_run_finds_in_its_directory_stays(ranks, tmp_path, tracker):
    """Whatever it is: nobody has said that it may go."""
    for iteration in (10, 40):
        checkpoint(tmp_path, iteration)
    if tracker is not None:
        name(tmp_path, tracker)
    ranks(1)(save_a_fifth, tmp_path, None)
    assert left(tmp_path) == [10, 40, 50]


def delete_while_saving_and_after(root: Path, protected: Path) -> list[list[int]]:
    from megatron_bdpo.training.callbacks.retention import Deletion, Retention

    saving = [True]
    deletion = Deletion(Retention(1), root, lambda: saving[0], goes_on_in_place=True)
    deletion.after_load(start(40, reference=str(protected)))
    deletion.after_files(root / "iter_0000040")
    found = []
    for saving[0] in (True, False):
        deletion.finished()
        found.append(left(root))
    return found


def test_nothing_goes_while_one_is_written_nor_links_nor_the_reference(ranks, tmp_path):
    elsewhere, root = checkpoint(tmp_path / "elsewhere", 10), tmp_path / "run"
    for iteration in (20, 30, 40):
        checkpoint(root, iteration)
    (root / "iter_0000010").symlink_to(elsewhere, target_is_directory=True)
    name(root, 40)
    found = ranks(1)(delete_while_saving_and_after, root, root / "iter_0000020")
    assert found == [[[10, 20, 30, 40], [10, 20, 40]]]
    assert (elsewhere / ".metadata").is_file()


def delete_and_be_killed(root: Path, left: int) -> None:
    """A process's life: it deletes, and after so many renames and removals it dies."""
    from megatron_bdpo.training.callbacks.retention import Deletion, Retention

    def count(event, _):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    deletion = Deletion(Retention(2), root, lambda: False, goes_on_in_place=True)
    deletion.after_load(start(40))
    deletion.after_files(root / "iter_0000050")
    sys.addaudithook(count)
    deletion.finished()


def test_killed_at_any_moment(ranks, tmp_path):
    """SIGKILL before each rename and each unlink of the deletion: what is there is whole, and the next one ends it."""
    for moment in (0, 1, 2, 3, 5, 7, 12):
        root = tmp_path / str(moment)
        for iteration in range(10, 60, 10):
            checkpoint(root, iteration)
        name(root, 50)
        process = start_server().Process(target=delete_and_be_killed, args=(root, moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"moment {moment}: not reached"
        for iteration in left(root):
            assert len(list((root / f"iter_{iteration:07d}").iterdir())) == 5, "half of a checkpoint keeps its name"
        assert {40, 50} <= {*left(root)}
        ranks(1)(save_a_fifth, root, 40)
        assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000040", "iter_0000050"]


def save_a_damaged_one(root: Path, name_of_file: str) -> str:
    import contextlib
    import io

    from megatron_bdpo.training.callbacks.retention import Deletion, Retention

    deletion = Deletion(Retention(2), root, lambda: False, goes_on_in_place=True)
    deletion.after_load(start(40))
    deletion.after_files(checkpoint(root, 50))
    (root / "iter_0000050" / name_of_file).write_text("y")
    name(root, 50)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        deletion.finished()
    return printed.getvalue()


def test_nothing_goes_for_a_newer_one_that_is_damaged(ranks, tmp_path):
    """Its digests are compared with what is on the disk, first."""
    for iteration in (10, 20, 30, 40):
        checkpoint(tmp_path, iteration)
    (said,) = ranks(1)(save_a_damaged_one, tmp_path, "__1_0.distcp")
    assert left(tmp_path) == [10, 20, 30, 40, 50]
    assert re.search(r"WARNING: .*iter_0000050 is damaged already.*__1_0\.distcp is not what was written", said, re.S)


STEPS = ["--train-iters", "4", "--num-layers", "2", "--tensor-model-parallel-size", "2"]


def train_and_damage(flags):
    """The second rank's file of the last checkpoint, as soon as it is written."""
    from megatron_bdpo.training.callbacks.callback import Callback

    class Damaging(Callback):
        def saving(self, directory):
            self.directory = directory

        def finished(self):
            if os.environ["RANK"] == "1":
                with (self.directory / "__1_0.distcp").open("r+b") as file:
                    file.write(b"?")

    return train(flags, callbacks=[Damaging()])


def test_a_damaged_file_of_another_rank_keeps_older_ones(ranks, tmp_path):
    """All ranks compare what they have written; the first one hears of it before it deletes."""
    flags = [*STEPS, "--save-interval", "1", "--keep-checkpoints", "1", "--save", str(tmp_path)]
    ranks(2)(train_and_damage, flags)
    assert {3, 4} <= {*left(tmp_path)}
    ranks(2)(train, [*flags, "--overwrite"])
    assert left(tmp_path) == [4]


@pytest.mark.parametrize("writer", [[], ASYNC], ids=["", "async"])
def test_a_run_that_keeps_two_and_goes_on_is_bit_identical(ranks, tmp_path, writer):
    """By the clock, which is over after every step; stopped after the second one."""
    run = tmp_path / "run"
    by_clock = [*STEPS, *writer, "--save-every-minutes", "0", "--keep-checkpoints", "2", "--save", str(run)]
    expected = ranks(2)(train, [*STEPS, "--save", str(tmp_path / "expected"), "--save-interval", "4"])
    ranks(2)(train, [*by_clock, "--exit-interval", "2"])
    assert left(run)[-1] == 2
    assert_bit_identical(expected, ranks(2)(train, [*by_clock, "--load", str(run)]))
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert len(left(run)) == 2, "and nothing else is left of the others"
    assert not list(run.glob("*.deleted"))


def test_megatrons_retain_interval_beside_the_newest(ranks, tmp_path):
    flags = [*STEPS, "--save-interval", "1", "--save-retain-interval", "2", "--train-iters", "5"]
    ranks(2)(train, [*flags, "--save", str(tmp_path)])
    assert left(tmp_path) == [2, 4, 5]
    more = ["--save", str(tmp_path / "more"), "--keep-checkpoints", "2", "--save-retain-interval", "3"]
    ranks(2)(train, [*flags, *more])
    assert left(tmp_path / "more") == [3, 4, 5]


def test_evaluations_by_the_clock(ranks, tmp_path):
    flags = [*STEPS, "--eval-share", "0.2", "--eval-every-minutes"]
    assert [len(ranks(2)(train, [*flags, minutes])[-1].evaluations) for minutes in ("0", "1000")] == [4, 1]
