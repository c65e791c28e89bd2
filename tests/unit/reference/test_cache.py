"""Reference scores on disk: what is written comes back, what is not whole is found out, jobs do not hurt each other."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference import cache as scores
from megatron_bdpo.training.reference.cache import ScoreCache, open_scores

IDENTITY = {"data": ["d1"], "chat_template": "{{ messages }}" * 30, "weights": "w1", "window_size": (8, 0)}
PAIRS, PART = 10, 4


def some_pairs(first: int, stop: int, **known) -> dict[str, np.ndarray]:
    """Pairs ``first`` to ``stop`` with scores that tell them apart; ``known`` replaces columns."""
    pair = np.arange(first, stop)
    sides = np.stack([pair, pair + 0.5], axis=1)
    return {
        "conditional": -1 / (sides + 3),
        "unconditional": -sides - 1,
        "tokens": np.stack([pair + 1, pair + 2], axis=1).astype(np.int32),
        "source": (pair % 2).astype(np.int16),
        "row": pair.astype(np.int64) * 3 + 1,
    } | known


def opened(directory: Path, **changes) -> ScoreCache:
    return ScoreCache.open(directory, IDENTITY | changes, {"sources": ["a.jsonl"]})


def add(cache: ScoreCache, first: int, stop: int, pairs: int = PAIRS, **known) -> None:
    cache.add(np.arange(first, stop), some_pairs(first, stop, **known), pairs)


def filled(directory: Path) -> ScoreCache:
    cache = opened(directory)
    for first in range(0, PAIRS, PART):
        add(cache, first, min(first + PART, PAIRS))
    return cache


def assert_same(found, expected):
    for name, values in expected.items():
        got = found[name] if isinstance(found, dict) else getattr(found, name)
        assert got.dtype == values.dtype, name
        assert np.array_equal(got, values, equal_nan=values.dtype.kind == "f"), name


def part_file(directory: Path, index: int = 1) -> Path:
    return directory / f"part-{index:05d}.safetensors"


def test_scores_come_back_to_the_bit(tmp_path):
    filled(tmp_path).finish(PAIRS, {"conditional": PAIRS, "unconditional": PAIRS}, {"seconds": 1.5})
    found = open_scores(tmp_path)
    assert len(found) == PAIRS
    assert_same(found, some_pairs(0, PAIRS))
    assert found.manifest["identity"] == IDENTITY | {"window_size": [8, 0]}
    assert found.manifest["sources"] == ["a.jsonl"]
    assert found.manifest["complete"] == {"pairs": PAIRS, "scored": {"conditional": PAIRS, "unconditional": PAIRS}}
    assert found.manifest["jobs"] == [{"seconds": 1.5}]
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_views_are_written_as_they_look(tmp_path):
    cache = opened(tmp_path)
    reversed_view = some_pairs(0, 3)["conditional"][:, ::-1]
    add(cache, 0, 3, conditional=reversed_view)
    found, _ = cache.read(3)
    assert np.array_equal(found["conditional"], reversed_view)


def test_a_part_may_have_log_probs_of_beginnings(tmp_path):
    """A directory that was begun without them stays good, and takes in those of later jobs."""
    cache = filled(tmp_path)
    assert "beginnings" not in load_file(part_file(tmp_path)), "a part has the bytes that it always had"
    found, damaged = cache.read(PAIRS)
    assert not damaged and found["beginnings"].shape == (PAIRS, 2) and np.isnan(found["beginnings"]).all()
    known = some_pairs(4, 8)["conditional"] / 2
    add(cache, 4, 8, beginnings=known, conditional=np.full((4, 2), -7.0))
    found, damaged = cache.read(PAIRS)
    assert not damaged and np.array_equal(found["beginnings"][4:8], known)
    assert np.isnan(found["beginnings"][[0, 9]]).all()
    assert_same(found, {name: values for name, values in some_pairs(0, PAIRS).items() if name != "beginnings"})
    cache.finish(PAIRS, {"conditional": PAIRS, "beginnings": 4}, {})
    assert np.array_equal(open_scores(tmp_path).beginnings, found["beginnings"], equal_nan=True)


def test_beginnings_count_for_the_checksum_and_have_their_shape(tmp_path):
    cache = opened(tmp_path)
    add(cache, 0, 4, beginnings=np.zeros((4, 3)))
    add(cache, 4, 8, beginnings=np.zeros((4, 2)))
    file = part_file(tmp_path)
    content = bytearray(file.read_bytes())
    place = content.rindex(b"\x00" * 64)  # they are zeros
    content[place + 3] = 1
    file.write_bytes(content)
    found, damaged = cache.read(PAIRS)
    assert "other shapes" in damaged[0] and "checksum" in damaged[1] and np.isnan(found["conditional"]).all()


def test_what_is_not_finished_has_to_be_asked_for(tmp_path):
    add(opened(tmp_path), 4, 8)
    with pytest.raises(UserError, match="not finished"):
        open_scores(tmp_path)
    found = open_scores(tmp_path, unfinished=True)
    assert len(found) == PAIRS
    assert np.isnan(found.conditional[:4]).all() and np.isnan(found.unconditional[:4]).all()
    assert (found.source[:4] == -1).all() and (found.tokens[:4] == 0).all()
    assert np.array_equal(found.conditional[4:8], some_pairs(4, 8)["conditional"])
    assert np.isnan(found.conditional[8:]).all()


def test_a_directory_above_names_those_with_scores(tmp_path):
    filled(tmp_path / "train")
    with pytest.raises(UserError, match=r"holds no reference scores.*These do: .*/train\."):
        open_scores(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ["d2"]}, r"data: \['d1'\] there, \['d2'\] here\nName"),
        ({"weights": "w2"}, "weights: w1 there, w2 here"),
        ({"window_size": None}, r"window_size: \[8, 0\] there, None here"),
        ({"rotary_base": 10000}, "rotary_base: nothing there, 10000 here"),
        ({"chat_template": "{{ other }}"}, r"chat_template: '\{\{ mess.* \(420 characters, \w+\) there, \{\{ other"),
        ({"data": [], "weights": "w2"}, r"data: .*\n  weights: "),
    ],
)
def test_another_identity_is_refused_by_the_fields_that_differ(tmp_path, change, message):
    opened(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        opened(tmp_path, **change)
    assert str(tmp_path) in str(refusal.value) and "--reference-cache" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "something else"),
        (json.dumps({"format": scores.FORMAT_NAME, "version": 99}), "format version 99"),
    ],
)
def test_manifests_that_cannot_be_read_are_refused(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length cut", "header cut", "values cut"])
def test_a_part_that_was_cut_short_is_named_and_unknown(tmp_path, keep):
    cache = filled(tmp_path)
    file = part_file(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    assert_damaged(cache, "")


def test_a_flipped_bit_is_found(tmp_path):
    cache = filled(tmp_path)
    file = part_file(tmp_path)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert_damaged(cache, "checksum")


def test_a_part_from_elsewhere_is_not_used(tmp_path):
    cache = filled(tmp_path / "here")
    add(opened(tmp_path / "there", weights="w2"), 4, 8)
    part_file(tmp_path / "here").write_bytes(part_file(tmp_path / "there", 0).read_bytes())
    assert_damaged(cache, "belongs to another")


@pytest.mark.parametrize(("pair", "pairs"), [([-1, 0], 10), ([0, 10], 10), ([0, 1], "ten")])
def test_pairs_that_there_cannot_be_are_damage(tmp_path, pair, pairs):
    cache = opened(tmp_path)
    cache.add(np.array(pair), some_pairs(0, 2), pairs)
    assert "pairs that there cannot be" in cache.read(PAIRS)[1][0]


def assert_damaged(cache: ScoreCache, reason: str) -> None:
    """Named, unknown, refused; and gone once a job has scored its pairs again, in a part of another name."""
    found, damaged = cache.read(PAIRS)
    assert len(damaged) == 1 and "part-00001.safetensors is damaged" in damaged[0] and reason in damaged[0]
    unknown = np.isnan(found["conditional"]).all(axis=1)
    assert unknown.tolist() == [False] * 4 + [True] * 4 + [False] * 2
    opened(cache.directory).finish(PAIRS, {}, {})
    with pytest.raises(UserError, match="part-00001"):
        open_scores(cache.directory)
    add(cache, 4, 8)
    cache.finish(PAIRS, {}, {})
    assert not part_file(cache.directory).exists() and part_file(cache.directory, 3).exists()
    assert_same(open_scores(cache.directory), some_pairs(0, PAIRS))


def test_what_is_there_stays_and_what_is_new_is_added(tmp_path):
    """First conditional scores, then unconditional ones, then more pairs than before, then others of the first pair."""
    cache = opened(tmp_path)
    whole, nothing = some_pairs(0, 4), np.full((2, 2), np.nan)
    add(cache, 0, 2, unconditional=nothing)
    add(cache, 0, 2, conditional=nothing)
    assert_same(cache.read(2)[0], some_pairs(0, 2))
    add(cache, 0, 4, conditional=np.concatenate([nothing, whole["conditional"][2:]]))
    assert_same(cache.read(4)[0], whole)
    add(cache, 0, 1, conditional=np.array([[-7.0, -8.0]]))
    assert_same(cache.read(4)[0], whole)
    assert_same(cache.read(3)[0], some_pairs(0, 3))


def test_each_part_is_told_to_a_launcher(tmp_path, monkeypatch):
    told = tmp_path / "told"
    told.mkdir()
    monkeypatch.setenv("BDPO_COMPLETED_DIR", str(told))
    cache = filled(tmp_path / "cache")
    (file,) = told.iterdir()
    expected = [json.dumps(str(part_file(cache.directory, index))) for index in range(3)]
    assert file.read_text().splitlines() == expected
    (told / file.name).unlink()
    told.rmdir()
    add(cache, 0, 1)  # a launcher that is gone hurts nobody


def test_parts_have_their_pairs_in_any_order(tmp_path):
    cache, order = opened(tmp_path), np.random.default_rng(3).permutation(PAIRS)
    for pairs in (order[:3], order[3:7], order[7:]):
        cache.add(pairs, {name: values[pairs] for name, values in some_pairs(0, PAIRS).items()}, PAIRS)
    assert_same(cache.read()[0], some_pairs(0, PAIRS))


def test_a_longer_store_of_the_same_data_finds_the_shorter_ones_pairs(tmp_path):
    filled(tmp_path)
    found, damaged = opened(tmp_path).read(PAIRS + 7)
    assert not damaged
    assert_same({name: values[:PAIRS] for name, values in found.items()}, some_pairs(0, PAIRS))
    assert np.isnan(found["conditional"][PAIRS:]).all()


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    cache = filled(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        add(cache, 0, 4)
    monkeypatch.undo()
    assert_same(cache.read(PAIRS)[0], some_pairs(0, PAIRS))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_two_jobs_at_once_do_no_harm(tmp_path, monkeypatch, links):
    """Each adds pairs of its own, again and again, while the other does: every file is whole, and nothing is lost."""
    if not links:  # only one job then: without them two that choose a name at the same moment cannot be told apart
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    jobs, goes, problems = 2 if links else 1, 10, []
    pairs = jobs * goes
    barrier = threading.Barrier(jobs + 1)

    def job(which):
        barrier.wait()
        cache = opened(tmp_path)
        for pair in range(which, pairs, jobs):
            add(cache, pair, pair + 1, pairs)
        cache.finish(pairs, {"conditional": pairs}, {})

    threads = [threading.Thread(target=job, args=(which,)) for which in range(jobs)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "manifest.json").exists():
            problems += opened(tmp_path).read(pairs)[1]
    assert not problems
    assert_same(open_scores(tmp_path), some_pairs(0, pairs))
    assert len(list(tmp_path.glob("part-*"))) == pairs


def test_a_part_is_an_open_file(tmp_path):
    filled(tmp_path)
    found = load_file(part_file(tmp_path))
    assert found.pop("pair").tolist() == [4, 5, 6, 7]
    assert_same(found, some_pairs(4, 8))


@pytest.mark.parametrize("change", [{"version": 2, "shard_pairs": 4}, {"shard_pairs": 4}], ids=["begun", "extended"])
def test_directories_that_version_2_has_begun_are_refused_in_a_line(tmp_path, change):
    """Its pairs are in files of another name: without them what is known would look complete."""
    cache = filled(tmp_path)
    cache.finish(PAIRS, {"conditional": PAIRS}, {})
    (tmp_path / "manifest.json").write_text(json.dumps(cache.manifest | change))
    for reader in (opened, open_scores):
        with pytest.raises(UserError, match=r"reads version 3\. Delete the directory; it is made again\.$"):
            reader(tmp_path)
