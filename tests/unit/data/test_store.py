"""From files to a store and back: what is kept, what is counted, when it is built anew, and what damage is noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data import prepare, store
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.text_encoder import Known
from megatron_bdpo.data.tokenization import PairTokenizer, PairTokens
from megatron_bdpo.errors import UserError

# NullTokenizer reads numbers: the text "1 2" is the tokens 1, 2. Its EOD is 99.
ROWS: list[dict[str, Any]] = [
    {"prompt": "1 2 3", "chosen": " 4 5", "rejected": " 6", "chosen_safe": True, "rejected_safe": False},
    {"prompt": "", "chosen": "7", "rejected": "8 9", "chosen_safe": 0},
    {"prompt": "1", "chosen": " 2", "rejected": " 3"},
]
EXPECTED = [([1, 2, 3], [4, 5, 99], [6, 99]), ([99], [7, 99], [8, 9, 99]), ([1], [2, 99], [3, 99])]


@pytest.fixture(scope="session")
def tokenizer(megatron_tokenizer: Callable[..., Any]) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=100))


@pytest.fixture
def settings(tmp_path: Path) -> PairDataSettings:
    """One file with `ROWS`."""
    write(tmp_path / "rows.jsonl", ROWS)
    return PairDataSettings((SourceSpec(str(tmp_path / "rows.jsonl")),), tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any] | str]) -> SourceSpec:
    """Write rows as JSON lines; a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return SourceSpec(str(path))


def built(cache: Path) -> list[str]:
    """Names of everything in the cache directory but the remembered digests."""
    return sorted(path.name for path in cache.iterdir() if path.name != "digests.json")


def contents(pairs: PairStore) -> list[tuple[list[int], ...]]:
    return [tuple(part.tolist() for part in pairs.pair(i).parts) for i in range(len(pairs))]


def test_round_trip(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    pairs = prepare_pairs(settings, tokenizer)

    assert contents(pairs) == EXPECTED
    assert pairs.lengths.tolist() == [[3, 3, 2], [1, 2, 3], [1, 2, 2]]
    assert pairs.row.tolist() == [1, 2, 3]
    assert pairs.source.tolist() == [0, 0, 0]
    assert pairs.unsafe.tolist() == [[0, 1], [1, -1], [-1, -1]]
    assert pairs.empty_prompt.tolist() == [99]
    assert pairs.describe(1) == f"{settings.sources[0].path}, line 2"
    assert pairs.info.settings["tokenizer"] == tokenizer.settings()["tokenizer"]
    assert pairs.report.pairs_kept == pairs.report.rows_read == [3]
    pairs.verify()
    with pytest.raises(IndexError):
        pairs.pair(3)


def test_arrays_are_memory_maps(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    """Views of one read-only map: no copy, no pickle, the dtypes that the docstring promises."""
    pairs = prepare_pairs(settings, tokenizer)

    for values, dtype in (
        (pairs.lengths, np.int32), (pairs.source, np.int16), (pairs.row, np.int64), (pairs.unsafe, np.int8)
    ):  # fmt: skip
        assert values.dtype == dtype and not values.flags.writeable
    for part in pairs.pair(1).parts:
        assert part.dtype == np.int32 and not part.flags.owndata and not part.flags.writeable
        assert np.shares_memory(part, pairs._tokens)


def test_several_sources_share_one_numbering(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    first = write(tmp_path / "a.jsonl", [ROWS[0], {"prompt": "1", "chosen": " ", "rejected": " 2"}, ROWS[1]])
    second = write(tmp_path / "b.jsonl", [ROWS[2], ROWS[0]])
    both = (first, dataclasses.replace(second, weight=0.5))

    pairs = prepare_pairs(PairDataSettings(both, tmp_path / "cache", max_pairs=3), tokenizer)

    assert pairs.source.tolist() == [0, 0, 1]
    assert pairs.row.tolist() == [1, 3, 1]
    assert pairs.sources == both
    assert pairs.report.rows_read == [3, 1], "reading stops at the last pair that is wanted"
    assert PairStore.open(pairs.directory).sources == both


def test_truncation_is_counted(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    pairs = prepare_pairs(dataclasses.replace(settings, max_prompt_tokens=2, max_response_tokens=2), tokenizer)

    assert contents(pairs) == [([2, 3], [4, 5], [6, 99]), ([99], [7, 99], [8, 9]), ([1], [2, 99], [3, 99])]
    assert (pairs.report.truncated_prompts, pairs.report.truncated_responses) == (1, 2)


def test_chat_data(tmp_path: Path, qwen_like: Path, megatron_tokenizer: Callable[..., Any]) -> None:
    chat = PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like)))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    source = write(tmp_path / "chat.jsonl", [{"prompt": messages, "chosen": "Paris", "rejected": "I would rather not"}])

    pairs = prepare_pairs(PairDataSettings((source,), tmp_path / "cache"), chat)

    assert pairs.empty_prompt.tolist() == chat.empty_prompt(chat=True).tolist()
    mixed = write(tmp_path / "mixed.jsonl", [{"prompt": "Answer:", "chosen": " a", "rejected": " b"}])
    with pytest.raises(UserError, match=r"mixed.jsonl, line 1 holds strings, the rows before it chat messages"):
        prepare_pairs(PairDataSettings((source, mixed), tmp_path / "cache"), chat)


# ---------------------------------------------------------------------------------------------------------------
# What is counted, and what is too much
# ---------------------------------------------------------------------------------------------------------------

BROKEN: list[dict[str, Any] | str] = ["{", {"prompt": "1", "chosen": " 2"}]
UNUSABLE: list[dict[str, Any] | str] = [
    {"prompt": "1", "chosen": " 2", "rejected": ""},
    {"prompt": "1", "chosen": " 2", "rejected": " 2"},
    {"prompt": "1", "chosen": "2", "rejected": " 3"},
    {"prompt": "1", "chosen": " a", "rejected": " 3"},
    {"prompt": "1", "chosen": " 2 3 4 5", "rejected": " 2 3 4 6"},
]


def test_every_reason_is_counted(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", [*BROKEN, *UNUSABLE, *UNUSABLE[:1] * 3, *ROWS])
    pairs = prepare_pairs(
        PairDataSettings((source,), tmp_path / "cache", max_response_tokens=3, max_malformed_share=0.2,
                         max_dropped_share=0.8), tokenizer
    )  # fmt: skip

    assert contents(pairs) == EXPECTED
    assert pairs.row.tolist() == [11, 12, 13]
    assert {problem.kind: (problem.count, problem.rows) for problem in pairs.report.problems} == {
        "BAD_JSON": (1, [1]),
        "MISSING_COLUMN": (1, [2]),
        "EMPTY_RESPONSE": (4, [3, 8, 9]),
        "IDENTICAL_RESPONSES": (1, [4]),
        "BOUNDARY_MERGE": (1, [5]),
        "NOT_ENCODABLE": (1, [6]),
        "IDENTICAL_AFTER_TRUNCATION": (1, [7]),
    }
    assert (pairs.report.malformed_rows, pairs.report.dropped_rows) == (2, 10)
    assert sum(pairs.report.rows_read) == 13
    text = pairs.report.format()
    assert "3 kept of 13 rows (10 dropped, 76.92%)" in text
    assert "4 unusable: empty response (row 3, 8, 9, ...)" in text
    assert "1 malformed: bad JSON (row 1)" in text


def test_first_broken_row_stops_the_run(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", [ROWS[0], *BROKEN])

    with pytest.raises(UserError, match=r"rows.jsonl, line 2: bad JSON.*--max-malformed-share"):
        prepare_pairs(PairDataSettings((source,), tmp_path / "cache"), tokenizer)
    assert built(tmp_path / "cache") == []


def test_too_many_rows_without_a_pair(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", [*BROKEN, *ROWS, *ROWS])
    lenient = PairDataSettings((source,), tmp_path / "cache", max_malformed_share=0.3)

    assert len(prepare_pairs(lenient, tokenizer)) == 6
    strict = dataclasses.replace(lenient, max_malformed_share=0.1)
    with pytest.raises(UserError, match=r"25.0% of the rows are malformed; --max-malformed-share allows 10.0%"):
        prepare_pairs(strict, tokenizer)
    strict = dataclasses.replace(lenient, max_dropped_share=0.2)
    with pytest.raises(UserError, match=r"(?s)25.0% of the rows are dropped.*6 kept of 8.*line 2: column 'rejected'"):
        prepare_pairs(strict, tokenizer)
    with pytest.raises(UserError, match=r"25.0% of the rows are dropped"):
        prepare_pairs(dataclasses.replace(strict, max_pairs=6), tokenizer)


def test_no_usable_pair(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", UNUSABLE[:2])

    with pytest.raises(UserError, match=r"(?s)No row .* can be used.*empty response \(row 1\).*line 1: rejected"):
        prepare_pairs(PairDataSettings((source,), tmp_path / "cache", max_dropped_share=1.0), tokenizer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": ()}, "--pair-data"),
        ({"max_prompt_tokens": 0}, "--max-prompt-length"),
        ({"max_response_tokens": -1}, "--max-response-length"),
        ({"max_pairs": 0}, "--max-pairs"),
        ({"max_dropped_share": 1.5}, "--max-dropped-share"),
        ({"max_malformed_share": float("nan")}, "--max-malformed-share"),
    ],
)
def test_settings_are_checked(settings: PairDataSettings, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(settings, **changes)


def test_what_decides_about_the_store(
    settings: PairDataSettings, tokenizer: PairTokenizer, tmp_path: Path, megatron_tokenizer: Callable[..., Any]
) -> None:
    first = prepare_pairs(settings, tokenizer)

    moved = write(tmp_path / "moved.jsonl", ROWS)
    same = dataclasses.replace(settings, sources=(SourceSpec(moved.path, 7.0),), max_dropped_share=0.9)
    again = prepare_pairs(same, tokenizer)
    assert (again.fingerprint, again.directory) == (first.fingerprint, first.directory)
    assert again.sources == same.sources

    other_content = write(tmp_path / "other.jsonl", ROWS[:2])
    others = [dataclasses.replace(settings, **changes) for changes in (
        {"max_prompt_tokens": 50}, {"max_response_tokens": 50}, {"max_pairs": 2}, {"sources": (other_content,)},
        {"sources": (*settings.sources, other_content)}, {"sources": (other_content, *settings.sources)},
    )]  # fmt: skip
    fingerprints = {prepare_pairs(other, tokenizer).fingerprint for other in others}
    other_tokenizer = PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=200))
    fingerprints |= {first.fingerprint, prepare_pairs(settings, other_tokenizer).fingerprint}

    assert len(fingerprints) == 8
    assert built(settings.cache_dir) == sorted(fingerprint[:16] for fingerprint in fingerprints)


def test_second_start_reads_nothing(
    settings: PairDataSettings, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(settings.sources[0].path, (1e9, 1e9))  # a file just written may still change within its time stamp
    prepare_pairs(settings, tokenizer)

    def forbidden(*_: object) -> None:
        raise AssertionError("the file is read again")

    monkeypatch.setattr(prepare, "_write_store", forbidden)
    monkeypatch.setattr(prepare, "sha256_of_file", forbidden)
    assert contents(prepare_pairs(settings, tokenizer)) == EXPECTED


def test_changed_file_is_noticed(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    """Same size, changed at once: the time stamp may not show it."""
    prepare_pairs(settings, tokenizer)
    path = Path(settings.sources[0].path)
    before = path.stat()
    path.write_text(path.read_text().replace(" 4 5", " 4 6"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert contents(prepare_pairs(settings, tokenizer))[0] == ([1, 2, 3], [4, 6, 99], [6, 99])


def test_damaged_memory_of_digests_is_ignored(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    settings.cache_dir.mkdir()
    for damage in ("{", "[]", ""):
        (settings.cache_dir / "digests.json").write_text(damage)
        assert len(prepare_pairs(settings, tokenizer)) == 3


class Interrupting(PairTokenizer):
    """Calls a function before the third pair is tokenized."""

    def __init__(self, tokenizer: PairTokenizer, interrupt: Callable[[], object]) -> None:
        super().__init__(tokenizer._tokenizer)
        self._interrupt = interrupt
        self._calls = 0

    def encode(self, record: PreferenceRecord, known: Known | None = None) -> PairTokens:
        self._calls += 1
        if self._calls == 3:
            self._interrupt()
        return super().encode(record, known)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_writer_leaves_nothing(
    settings: PairDataSettings, tokenizer: PairTokenizer, error: type[BaseException]
) -> None:
    def interrupt() -> None:
        raise error

    with pytest.raises(error):
        prepare_pairs(settings, Interrupting(tokenizer, interrupt))

    assert built(settings.cache_dir) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.tokenization import PairTokenizer

class Tokenizer:
    library, chat_template, eod, bos = "null-text", None, 99, None
    vocab_size = 100
    def tokenize(self, text):
        if text == "1 3":
            os.kill(os.getpid(), signal.SIGKILL)
        return [int(word) for word in text.split(" ")]
Tokenizer._tokenizer = Tokenizer()
prepare_pairs(PairDataSettings((SourceSpec(sys.argv[1]),), Path(sys.argv[2])), PairTokenizer(Tokenizer()))
"""


def test_killed_writer_leaves_nothing_that_looks_complete(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    arguments = [sys.executable, "-c", KILLED, settings.sources[0].path, str(settings.cache_dir)]
    assert subprocess.run(arguments, check=False, timeout=60).returncode == -9
    (left,) = built(settings.cache_dir)
    with pytest.raises(UserError, match="no pair store"):
        PairStore.open(settings.cache_dir / left)

    pairs = prepare_pairs(settings, tokenizer)

    assert contents(pairs) == EXPECTED
    assert built(settings.cache_dir) == [left, pairs.directory.name]


def test_the_faster_of_two_writers_wins(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    faster = []

    def other_process() -> None:
        pairs = prepare_pairs(settings, tokenizer)
        faster.append((pairs.directory / "meta.json").stat().st_ino)

    pairs = prepare_pairs(settings, Interrupting(tokenizer, other_process))

    assert (pairs.directory / "meta.json").stat().st_ino == faster[0]
    assert built(settings.cache_dir) == [pairs.directory.name]


def test_cache_that_cannot_be_written(
    settings: PairDataSettings, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="--pair-cache-dir"):
        prepare_pairs(dataclasses.replace(settings, cache_dir=Path(settings.sources[0].path)), tokenizer)
    monkeypatch.setattr(store, "write_whole", full_disk)
    with pytest.raises(UserError, match=r"cannot write to .*cache: No space left"):
        prepare_pairs(settings, tokenizer)
    assert built(settings.cache_dir) == []


def test_short_work_is_done_silently(
    settings: PairDataSettings, tokenizer: PairTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare_pairs(settings, tokenizer)

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["tokens", "starts", "lengths", "source", "row", "unsafe", "label"])
def test_damaged_arrays(settings: PairDataSettings, tokenizer: PairTokenizer, name: str) -> None:
    directory = prepare_pairs(settings, tokenizer).directory
    path = directory / f"{name}.bin"
    whole = path.read_bytes()

    for damaged in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}.bin has {len(damaged)} bytes instead of {len(whole)}"):
            PairStore.open(directory)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match=rf"checksum of {name}.bin is wrong. Delete the directory"):
        PairStore.open(directory).verify()
    path.unlink()
    with pytest.raises(UserError, match=f"{name}.bin cannot be read"):
        PairStore.open(directory)


def test_damaged_meta(settings: PairDataSettings, tokenizer: PairTokenizer, tmp_path: Path) -> None:
    directory = prepare_pairs(settings, tokenizer).directory
    path = directory / "meta.json"
    meta = json.loads(path.read_text())

    for text, words in {
        path.read_text()[:-20]: "is no JSON",
        "[]": "written by something else",
        json.dumps({**meta, "format": "arrow"}): "written by something else",
        json.dumps({**meta, "version": 0}): "format version 0",
        json.dumps({key: value for key, value in meta.items() if key != "report"}): "report is missing",
        json.dumps({**meta, "arrays": {**meta["arrays"], "row": 3}}): "arrays.row is 3",
        json.dumps({**meta, "arrays": {**meta["arrays"], "row": {"rows": 9, "crc32": 0}}}): "row.bin has",
        json.dumps({**meta, "empty_prompt": [2**31]}): r"empty_prompt.0 is 2147483648",
        json.dumps({**meta, "empty_prompt": []}): "no empty prompt",
        json.dumps({**meta, "report": {**meta["report"], "rows_read": [None]}}): "in its report, rows_read.0 is None",
        "[" * 100_000: "nested too deeply",
        json.dumps({**meta, "fingerprint": "0" * 64}): "store of other data",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            prepare_pairs(settings, tokenizer)
    path.write_text(json.dumps({**meta, "sources": []}))
    with pytest.raises(UserError, match="more sources than it names"):
        PairStore.open(directory)
    with pytest.raises(UserError, match="no pair store"):
        PairStore.open(tmp_path)


def test_settings_of_chats_are_refused_for_strings(settings: PairDataSettings, tokenizer: PairTokenizer) -> None:
    of_megatron = tokenizer._tokenizer
    for changed, flag in (
        (PairTokenizer(of_megatron, {"think": False}), "--chat-template-kwargs: the pairs are strings"),
        (PairTokenizer(of_megatron, unconditional_context=True), "--unconditional-prompt context: the pairs are"),
    ):
        with pytest.raises(UserError, match=flag):
            prepare_pairs(settings, changed)
