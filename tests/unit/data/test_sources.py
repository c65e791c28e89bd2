"""Reading rows from everything that can be named, and what is said when that fails."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_bdpo.data import sources
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.sources import SourceSpec, content_digest, describe_row, parse_sources, read_rows
from megatron_bdpo.errors import UserError

ROWS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(5)]


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path | str) -> list[tuple[int, Any]]:
    return list(read_rows(SourceSpec(str(path))))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a"], (SourceSpec("a", 1.0),)),
        (["a", "b"], (SourceSpec("a", 1.0), SourceSpec("b", 1.0))),
        (["0.3", "a", "2", "b"], (SourceSpec("a", 0.3), SourceSpec("b", 2.0))),
        (["a", "3e-1", "b"], (SourceSpec("a", 1.0), SourceSpec("b", 0.3))),
        (["2", "./7"], (SourceSpec("./7", 2.0),)),
    ],
)
def test_parse_sources(tokens: list[str], expected: tuple[SourceSpec, ...]) -> None:
    assert parse_sources(tokens) == expected


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "no path"),
        (["a", "2"], "no path follows the weight 2"),
        (["1", "2", "a"], "follow each other"),
        (["-1", "a"], "not a positive number"),
        (["0", "a"], "not a positive number"),
        (["nan", "a"], "not a positive number"),
        (["a", "2", "a"], "named 2 times"),
    ],
)
def test_parse_sources_refuses(tokens: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_sources(tokens)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "ROWS.JSONL.GZ"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    data = json_lines(ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)

    assert read(tmp_path / name) == list(enumerate(ROWS, start=1))


def test_rows_are_numbered_by_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    lines = [b"\xef\xbb\xbf" + good, b"", b"{broken", b'"text"', b'{"prompt": "\xff"}', good]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n".join(lines))

    found = read(path)

    assert [number for number, _ in found] == [1, 3, 4, 5, 6]
    assert [row for _, row in found if not isinstance(row, RowProblem)] == [ROWS[0], ROWS[0]]
    for _, row in found[1:4]:
        assert isinstance(row, RowProblem)
        assert row.kind is ProblemKind.BAD_JSON
        assert "rows.jsonl" not in row.detail  # whoever reports it adds where: once


def test_parquet_and_arrow(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chat = [{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}] * 2
    for rows in (ROWS, chat):
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(str(tmp_path / "rows.parquet"))
        data.save_to_disk(str(tmp_path / "saved"))

        expected = list(enumerate(rows, start=1))
        assert read(tmp_path / "rows.parquet") == expected
        assert read(tmp_path / "saved") == expected
        assert read(next((tmp_path / "saved").glob("*.arrow"))) == expected


def test_saved_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    first, second = datasets.Dataset.from_list(ROWS[:3]), datasets.Dataset.from_list(ROWS[3:])
    datasets.DatasetDict(train=first, test=second).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(a=first, b=second).save_to_disk(str(tmp_path / "odd"))

    assert [row for _, row in read(tmp_path / "both")] == ROWS[:3]
    assert [row for _, row in read(f"{tmp_path}/both:test")] == ROWS[3:]
    assert read(f"{tmp_path}/both:train[1:3]") == [(1, ROWS[1]), (2, ROWS[2])]
    with pytest.raises(UserError, match="holds the splits a, b"):
        read(tmp_path / "odd")
    with pytest.raises(UserError, match="cannot use split 'valid'"):
        read(f"{tmp_path}/both:valid")
    digests = {content_digest(SourceSpec(f"{tmp_path}/both{split}")) for split in ("", ":test", ":train[:1]")}
    assert len(digests) == 3


def test_directory_of_shards(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json_lines(ROWS[2:]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[:2]).encode()))
    (tmp_path / "README.md").write_text("not data")

    assert read(tmp_path) == list(enumerate(ROWS, start=1))
    assert describe_row(SourceSpec(str(tmp_path)), 3) == f"{tmp_path}, row 3"
    assert describe_row(SourceSpec(str(tmp_path / "b.jsonl")), 3) == f"{tmp_path}/b.jsonl, line 3"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b"\n \n", "is empty"),
        ("rows.jsonl", b"[\n{}\n]", "one object per line"),
        ("rows.jsonl", b'[{"a": 1}]', "one object per line"),
        ("rows.jsonl.gz", b"plain text", "not a whole gzip file"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 9, mtime=0)[:-9], "not a whole gzip file"),
        ("rows.parquet", b"not a table", "rows.parquet cannot be read"),
        ("rows.arrow", b"not a table", "rows.arrow cannot be read"),
        ("rows.csv", b"a,b", "must end in one of .jsonl"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_what_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json_lines(ROWS))
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / "mixed" / name).write_text("")
    (tmp_path / "empty").mkdir()
    for path, words in {
        "missing.jsonl": "no such file",
        "deep/er/name": "no such file",
        "rows.jsonl:train": "not for a file",
        "empty": "holds no data",
        "empty:train": "not written by Dataset.save_to_disk",
        "mixed": "mixes .jsonl, .parquet",
    }.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path / path)
    with pytest.raises(UserError, match="no split follows the colon"):
        read("org/set:")


def test_hub_name_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`datasets` by itself tries again for half a minute. Its own offline switch is left as it was."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(sources.hub, "is_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = datasets.config.HF_HUB_OFFLINE

    started = time.monotonic()
    with pytest.raises(UserError, match=r"some-org/no-such-set.*cannot be reached.*save_to_disk"):
        read("some-org/no-such-set:train[:10]")
    assert time.monotonic() - started < 5
    assert datasets.config.HF_HUB_OFFLINE is before


def test_hub_rows_and_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources.hub, "is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert read("org/set:test[:5]") == list(enumerate(ROWS, start=1))
    assert len(content_digest(SourceSpec("org/set"))) == 64
    assert asked == [("org/set", "test[:5]"), ("org/set", "train")]


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text(json_lines(ROWS))
    second.write_text(json_lines(ROWS))
    digest = content_digest(SourceSpec(str(first)))

    assert content_digest(SourceSpec(str(second), weight=3.0)) == digest
    second.write_text(json_lines(ROWS).replace("p4", "p5"))
    assert content_digest(SourceSpec(str(second))) != digest


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json.gz"])
def test_a_line_without_end_takes_bounded_memory(tmp_path: Path, name: str) -> None:
    """A small gzip file that holds a line of 200 MiB: it is named, and never held as a whole."""
    path, piece = tmp_path / name, b"a" * (1 << 20)
    if name.endswith("gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(json_lines(ROWS).encode())
            for _ in range(200):
                file.write(piece)
    else:
        with path.open("wb") as plain:
            plain.write(json_lines(ROWS).encode())
            plain.write(piece * 65)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"{name}, line 6 has more than 64 MiB.* Write one object per line"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * sources.MOST_LINE_BYTES
    finally:
        tracemalloc.stop()
