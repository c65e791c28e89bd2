"""The file that keeps reference values, and what a run takes from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_bdpo.errors import UserError
from megatron_bdpo.training import reference_cache
from tests.harness.jobs import DATA, last_stage, train

MANIFEST = {"data": "tokens 12", "reference": "weights 34"}
VALUES = {
    "conditional": np.array([[-1.5, -2.25], [-1 / 3, np.nan]]),
    "unconditional": np.array([[-1e-9, -1e9], [0.0, -7.0]]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "train.safetensors"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, expected_value in expected.items():
        assert found[name].dtype == np.float64
        assert np.array_equal(found[name], expected_value, equal_nan=True), name


# The file


def test_values_come_back_to_the_bit(path):
    reference_cache.write(path, MANIFEST, VALUES)
    assert_same(reference_cache.read(path, MANIFEST), VALUES)


def test_views_are_written_as_they_look(path):
    """Safetensors writes the memory behind an array; a reversed view of it is another array."""
    values = {"conditional": VALUES["conditional"][:, ::-1]}
    reference_cache.write(path, MANIFEST, values)
    assert_same(reference_cache.read(path, MANIFEST), values)


def test_missing_file_is_none(path):
    assert reference_cache.read(path, MANIFEST) is None


def test_writing_again_replaces(path):
    reference_cache.write(path, MANIFEST, {"conditional": VALUES["conditional"]})
    reference_cache.write(path, MANIFEST, VALUES)
    assert_same(reference_cache.read(path, MANIFEST), VALUES)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "tokens 99"}, r"belongs to something else:\n  data: tokens 12 in the file, tokens 99 here\nGive"),
        ({"reference": "weights 0"}, r"reference: weights 34 in the file, weights 0 here"),
        ({"template": "chatml"}, r"template: missing in the file, chatml here"),
        ({"data": "a", "reference": "b"}, r"data: tokens 12 .*\n  reference: weights 34 "),
    ],
)
def test_values_of_something_else_are_refused(path, change, message):
    reference_cache.write(path, MANIFEST, VALUES)
    with pytest.raises(UserError, match=message) as refusal:
        reference_cache.read(path, MANIFEST | change)
    assert str(path) in str(refusal.value)
    assert "--reference-cache" in str(refusal.value)


def test_values_of_another_format_are_refused(path, monkeypatch):
    reference_cache.write(path, MANIFEST, VALUES)
    monkeypatch.setattr(reference_cache, "FORMAT", "2")
    with pytest.raises(UserError, match="format: 1 in the file, 2 here"):
        reference_cache.read(path, MANIFEST)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length cut", "header cut", "values cut"])
def test_file_that_was_cut_short_is_refused(path, keep):
    reference_cache.write(path, MANIFEST, VALUES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train\.safetensors is damaged .* Delete it"):
        reference_cache.read(path, MANIFEST)


def test_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    reference_cache.write(path, MANIFEST, VALUES)

    def fail_midway(values, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(reference_cache, "save_file", fail_midway)
    with pytest.raises(OSError, match="disk full"):
        reference_cache.write(path, MANIFEST, {"conditional": np.zeros((2, 2))})
    assert_same(reference_cache.read(path, MANIFEST), VALUES)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Its use


def cached(directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    (file,) = directory.glob("reference-*/*.safetensors")
    return file, load_file(file)


def test_a_longer_run_takes_the_values_of_a_shorter_one(ranks, tmp_path):
    """All pairs are scored, also those the short run never draws, however short its packs could be."""
    job = {"pair_cache_dir": str(tmp_path), "max_pairs": 64, "pairs_per_step": 4}
    ranks(1)(train, ["--no-pack-pairs"], train_iters=1, **job)
    file, values = cached(tmp_path)
    assert np.isfinite(values["conditional"]).all()
    written = file.stat().st_mtime_ns
    ranks(1)(train, ["--no-pack-pairs"], train_iters=4, **job)
    assert file.stat().st_mtime_ns == written


def test_pairs_that_were_too_long_before_are_scored_when_they_are_needed(ranks, tmp_path):
    job = {"pair_cache_dir": str(tmp_path), "max_pairs": 32, "train_iters": 1}
    ranks(1)(train, ["--seq-length", "160", "--long-pairs", "drop"], **job)
    file, short = cached(tmp_path)
    left_out = np.isnan(short["conditional"]).all(axis=1)
    assert 0 < left_out.sum() < 32
    ranks(1)(train, [], **job)
    _, values = cached(tmp_path)
    assert np.isfinite(values["conditional"]).all()
    # Packed otherwise, so added up in another order: fp32 rounding.
    assert values["conditional"][~left_out] == pytest.approx(short["conditional"][~left_out], rel=1e-6)
    written = file.stat().st_mtime_ns
    ranks(1)(train, ["--seq-length", "160", "--long-pairs", "drop"], **job)
    assert file.stat().st_mtime_ns == written


def test_resident_values_are_told_apart_when_a_pair_comes_twice_in_a_step(ranks, tmp_path):
    """Six pairs, each five times an epoch: packs of one step begin with the same pair and go on with another."""
    job = {"max_pairs": 6, "pairs_per_step": 16, "train_iters": 2}
    flags = ["--pair-data", "5", str(DATA / "train.jsonl"), "--reference"]
    runs = {
        mode: last_stage(ranks(1)(train, [*flags, mode], pair_cache_dir=str(tmp_path), **job)).steps
        for mode in ("precomputed", "resident")
    }
    for step, expected in zip(runs["resident"], runs["precomputed"], strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "comprehension/chosen"):
            assert step[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
