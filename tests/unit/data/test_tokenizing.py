"""Several processes make what one makes; what was done before a stop is not done again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bdpo.data import chat_template, tokenizing
from megatron_bdpo.data.chat_template import ChatTemplate
from megatron_bdpo.data.prepare import PairDataSettings, make_part, prepare_pairs
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.row_reader import RECOGNISED, row_readers
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.text_encoder import Known, TextEncoder
from megatron_bdpo.data.tokenization import PairTokenizer, PairTokens
from megatron_bdpo.data.tokenized_rows import ARRAYS, Outcome, TokenizedRows
from megatron_bdpo.errors import UserError
from tests.unit.data.test_store import built, write

ROWS = 1000


class Counting(PairTokenizer):
    """Leaves a mark in a directory for each record, whatever process encodes it."""

    def __init__(self, tokenizer: Any, directory: Path, kill_at: int | None = None) -> None:
        super().__init__(tokenizer)
        self._directory, self._kill_at = directory, kill_at

    def encode(self, record: PreferenceRecord, known: Known | None = None) -> PairTokens:
        number = int(str(record.prompt).split()[0])
        if number == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        (self._directory / f"{number}").touch()
        return super().encode(record, known)

    def done(self) -> set[int]:
        found = {int(path.name) for path in self._directory.iterdir()}
        for path in self._directory.iterdir():
            path.unlink()
        return found


@pytest.fixture
def of_megatron(megatron_tokenizer: Callable[..., Any]) -> Any:
    return megatron_tokenizer("NullTokenizer", vocab_size=2 * ROWS)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairDataSettings:
    """Two files with bad rows between the good ones, in shards of 60 rows."""
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", 20)
    monkeypatch.setattr(tokenizing, "CHUNKS", 3)
    rows: list[Any] = [
        {"prompt": f"{i} 1", "chosen": f" {i}" * (i % 7 + 1), "rejected": f" {i + 1}", "note": "x"} for i in range(ROWS)
    ]
    for i in range(0, ROWS, 50):
        rows[i]["chosen"] = rows[i]["rejected"]
    sources = write(tmp_path / "a.jsonl", rows[:650]), write(tmp_path / "b.jsonl", rows[650:])
    return PairDataSettings(sources, tmp_path / "cache")


def arrays(store: PairStore) -> dict[str, list[Any]]:
    found = {name: getattr(store, name).tolist() for name in ("lengths", "source", "row", "unsafe")}
    return found | {"tokens": [[part.tolist() for part in store.pair(i).parts] for i in range(len(store))]}


def test_processes_make_what_one_makes(data: PairDataSettings, of_megatron: Any, tmp_path: Path) -> None:
    tokenizer = PairTokenizer(of_megatron)
    several = prepare_pairs(replace(data, workers=3), tokenizer)
    one = prepare_pairs(replace(data, workers=1, cache_dir=tmp_path / "other"), tokenizer)
    assert arrays(several) == arrays(one) and len(one) == ROWS - 20
    assert several.report == one.report
    assert one.report.unread == {"column note": ROWS - 20}
    assert sum(one.report.rows_read) == ROWS and one.report.dropped_rows == 20
    assert [path for path in built(data.cache_dir) if not (data.cache_dir / path / "meta.json").exists()] == []


def status_of_fork(function: Callable[[], int], limit: float = 60.0) -> int:
    """Of a copy of this process that ends with ``function``'s value.

    Other tests may have left threads here, one of which may hold a lock as the copy is made: then that waits for ever,
    and another copy is made.
    """
    for _ in range(3):
        pid = os.fork()
        if not pid:
            try:
                os._exit(function())
            finally:
                os._exit(5)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise TimeoutError("three copies of this process have hung")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_process_loses_a_shard_at_most(
    data: PairDataSettings, of_megatron: Any, tmp_path: Path, workers: int
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    settings = replace(data, workers=workers)

    def killed() -> int:  # the process itself, or one of its workers
        try:
            prepare_pairs(settings, Counting(of_megatron, marks, kill_at=505), progress=False)
        except UserError as error:
            return 3 if "--tokenizer-workers" in str(error) else 4
        return 0

    assert status_of_fork(killed) != 0
    counting = Counting(of_megatron, marks)
    assert len(counting.done()) >= 400

    store = prepare_pairs(settings, counting, progress=False)

    again = counting.done()
    # Two processes are at most eight chunks ahead of the first that is not done.
    assert min(again) >= (480 if workers == 1 else 480 - 8 * 20) and again >= set(range(481, ROWS)) - set(
        range(0, ROWS, 50)
    )
    assert arrays(store) == arrays(
        prepare_pairs(replace(data, cache_dir=tmp_path / "other"), PairTokenizer(of_megatron))
    )


def test_what_is_completed_is_told_to_a_launcher(
    data: PairDataSettings, of_megatron: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole shards, by name, also of a process that is killed; then the store."""
    told = tmp_path / "told"
    told.mkdir()
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("BDPO_COMPLETED_DIR", str(told))

    def names() -> list[str]:
        return sorted(line for file in told.iterdir() for line in file.read_text().splitlines())

    def killed() -> int:
        prepare_pairs(replace(data, workers=1), Counting(of_megatron, tmp_path / "marks", kill_at=505), progress=False)
        return 0

    assert status_of_fork(killed) != 0
    (shards,) = data.cache_dir.glob("*.shards")
    assert names() == [f'"{path}"' for path in sorted(shards.iterdir())] and len(names()) == 8
    store = prepare_pairs(data, PairTokenizer(of_megatron), progress=False)
    assert f'"{store.directory}"' in names() and len(names()) > 9
    before = names()
    prepare_pairs(data, PairTokenizer(of_megatron), progress=False)
    assert names() == before, "what is found is no progress"


def test_nodes_make_parts(data: PairDataSettings, of_megatron: Any, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    counting = Counting(of_megatron, marks)
    for part in range(2):
        make_part(data, counting, part, 2)
        numbers = counting.done()
        assert len(numbers) > 400
    store = prepare_pairs(data, counting)
    assert not counting.done()
    assert store.row.tolist() == [i + 1 for i in range(650) if i % 50] + [i - 649 for i in range(650, ROWS) if i % 50]
    make_part(data, counting, 0, 2)
    assert not counting.done(), "the store is there"


def test_a_shard_that_is_damaged_is_made_again(data: PairDataSettings, of_megatron: Any, tmp_path: Path) -> None:
    make_part(data, PairTokenizer(of_megatron), 0, 1)
    (directory,) = data.cache_dir.glob("*.shards")
    shards = sorted(directory.iterdir())
    shards[1].write_bytes(shards[1].read_bytes()[:-30])
    shards[2].write_bytes(b"")
    store = prepare_pairs(data, PairTokenizer(of_megatron))
    assert len(store) == ROWS - 20 and not directory.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_pairs_and_no_row_after_them(data: PairDataSettings, of_megatron: Any, workers: int) -> None:
    lines = Path(data.sources[0].path).read_text().splitlines()
    lines[57] = "{"  # just behind them
    Path(data.sources[0].path).write_text("\n".join(lines))
    store = prepare_pairs(replace(data, max_pairs=55, workers=workers), PairTokenizer(of_megatron))
    assert store.row.tolist() == [i + 1 for i in range(58) if i % 50][:55]
    assert sum(store.report.rows_read) == 57 and store.report.dropped_rows == 2


def test_a_malformed_row_ends_it_at_once(data: PairDataSettings, of_megatron: Any, tmp_path: Path) -> None:
    """Before the shard is done, and it is the first one that is named."""
    lines = Path(data.sources[0].path).read_text().splitlines()
    lines[5], lines[25] = "{", "["
    Path(data.sources[0].path).write_text("\n".join(lines))
    marks = tmp_path / "marks"
    marks.mkdir()
    counting = Counting(of_megatron, marks)
    with pytest.raises(UserError, match=r"a\.jsonl, line 6: bad JSON"):
        prepare_pairs(replace(data, workers=1), counting)
    assert len(counting.done()) <= 20


def test_columns_that_are_ever_new_are_not_all_kept(data: PairDataSettings, of_megatron: Any) -> None:
    work = tokenizing.RowTokenizer(PairTokenizer(of_megatron), row_readers(data.sources, RECOGNISED))
    rows = [{"prompt": "1", "chosen": " 2", "rejected": " 3", f"id{i}": i} for i in range(300)]
    unread = work(0, list(enumerate(rows, start=1))).outcome.unread
    assert len(unread) == 101 and unread["others"] == 200 and unread["column id0"] == 1


def test_rows_survive_bytes(data: PairDataSettings, of_megatron: Any) -> None:
    work = tokenizing.RowTokenizer(PairTokenizer(of_megatron), row_readers(data.sources, RECOGNISED))
    rows = work(0, [(3, b'{"prompt": "1", "chosen": " 2", "rejected": " 3"}'), (4, b"{"), (5, {"prompt": None})])
    again = TokenizedRows.from_bytes(rows.to_bytes())
    assert again.outcome == rows.outcome and rows.outcome.read == 3
    assert all(getattr(again, name).tobytes() == getattr(rows, name).tobytes() for name in ARRAYS)
    with pytest.raises(ValueError, match="Safetensor"):
        TokenizedRows.from_bytes(rows.to_bytes()[:200])


def test_long_lines_make_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", 4)
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", 10)
    rows = [(number, b"x" * length) for number, length in enumerate([1, 1, 1, 1, 1, 9, 20, 3])]
    chunks = list(tokenizing._cut(rows))
    assert [[number for number, _ in chunk] for chunk in chunks] == [[0, 1, 2, 3], [4, 5], [6], [7]]


def test_a_template_that_loops_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops in loops pass the sandbox's limit of ranges. The row and the template are named, in one process or two."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.3)
    rounds = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc")
    loop = rounds + "{% endfor %}" * 3
    template = "{% if messages[0]['content'] == 'slow' %}" + loop + "{% endif %}{{ messages[0]['content'] }}"
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[E]": 0}, "[E]"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    of_loop = ChatTemplate(Templated(fast), "huggingface")
    messages = [{"role": "user", "content": "slow"}]
    assert of_loop.apply([{"role": "user", "content": "quick"}], {}, add_generation_prompt=True) == "quick"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"chat template takes more than 0\.3 s .*It begins with \{% if messages"):
        of_loop.apply(messages, {}, add_generation_prompt=True)
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


class Templated:
    """What ``ChatTemplate`` uses of Megatron's tokenizer."""

    def __init__(self, fast: Any) -> None:
        self.chat_template = fast.chat_template
        self.apply_chat_template = fast.apply_chat_template


class Slow(PairTokenizer):
    """Meets an error of the tokenizer's, not of the row's, at the seventh row."""

    def encode(self, record: PreferenceRecord, known: Known | None = None) -> PairTokens:
        if str(record.prompt).startswith("7 "):
            raise UserError("the template takes too long. Look at it.")
        return super().encode(record, known)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_tokenizer_names_the_row(data: PairDataSettings, of_megatron: Any, workers: int) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 8: the template takes too long\. Look at it\."):
        prepare_pairs(replace(data, workers=workers), Slow(of_megatron))


def test_control_tokens_in_texts_are_counted(tmp_path: Path) -> None:
    """With file and first rows, over chunks and after a way through the store; a token of the tokenizer's own alone."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[E]": 0}, "[E]"))
    backend.add_special_tokens(["<|im_start|>", "<|im|>"])
    encoder = TextEncoder.__new__(TextEncoder)
    encoder._fast = backend
    chat = [{"role": "user", "content": "a <|im_start|>system b", "tool": {"x": ["<|im|>"]}}]
    assert encoder.spelled_out([chat, "<|end|>"]) == {"<|im_start|>", "<|im|>"}
    assert encoder.spelled_out("im_start") == set()
    report = DataReport(["a.jsonl", "b.jsonl"])
    for source in (0, 0, 1):
        outcome = Outcome()
        for row in (3, 4):
            outcome.add_spelled_out("<|im|>", 1, [row])
        report.add(source, 2, outcome)
    expected = "control tokens in texts, taken as such: <|im|> in 4 (row 3, 4 of a.jsonl), <|im|> in 2 (row"
    assert expected in report.format()
    assert DataReport.from_json(report.to_json()) == report
    before = {name: value for name, value in report.to_json().items() if name != "spelled_out"}
    assert DataReport.from_json(before).spelled_out == []


def test_rows_that_spell_out_control_tokens_can_be_refused(data: PairDataSettings, of_megatron: Any) -> None:
    """They are dropped and counted by that reason, in a store of its own."""

    class Spelled(PairTokenizer):
        def spelled_out(self, record: PreferenceRecord) -> set[str]:
            return {"<|im|>"} if str(record.prompt).startswith("7 ") else set()

    counted = prepare_pairs(data, Spelled(of_megatron))
    refused = prepare_pairs(replace(data, refuse_control_tokens=True), Spelled(of_megatron))
    assert counted.fingerprint != refused.fingerprint
    (problem,) = [each for each in refused.report.problems if each.kind == "CONTROL_TOKENS"]
    assert (problem.rows[0], problem.detail) == (8, "they hold <|im|>")
    assert sum(refused.report.pairs_kept) == sum(counted.report.pairs_kept) - problem.count
    assert not refused.report.spelled_out
