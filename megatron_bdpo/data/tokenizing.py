"""Rows to tokens in several processes, in the rows' order; what was done is found again by the next start.

Rows go through in chunks, and ``CHUNKS`` chunks of one source are a shard, which is kept until all of them are done: a
stop loses one shard per process group at most. Each node may make its own part of the shards.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_bdpo.artifact import tell_completed, write_whole
from megatron_bdpo.data.messages import VARIABLES
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.row_reader import RowReader, pair_rows
from megatron_bdpo.data.sources import RawRow, Row, SourceSpec, count_rows, describe_row, parse_raw, read_raw_rows
from megatron_bdpo.data.text_encoder import Known
from megatron_bdpo.data.tokenization import PairTokenizer, PairTokens, TokenArray
from megatron_bdpo.data.tokenized_rows import Outcome, RowsBuilder, TokenizedRows, join
from megatron_bdpo.data.truncation import truncate
from megatron_bdpo.errors import UserError
from megatron_bdpo.user_files import read_regular

CHUNK_ROWS = 250
CHUNK_BYTES = 16 * 2**20
CHUNKS = 40  # of a shard: 10,000 rows, which take a core half a minute
_MOST_WORKERS = 32
_MOST_SHARD_BYTES = 1 << 36  # bounds nothing but what has no end
_AHEAD = 4  # chunks in work or waiting, per process: bounds the memory
_FEW_CHUNKS = 8  # of which no other process is started
_SILENT_SECONDS = 10.0  # where no one watches, progress is shown only of what takes longer

type RawRows = Sequence[tuple[int, RawRow]]
"""Rows of one source, each with its number."""


class _Made(NamedTuple):
    """What a pair of a row gives."""

    record: PreferenceRecord
    spelled_out: list[str]  # control tokens in its texts
    whole: PairTokens  # before it was cut
    pair: PairTokens
    own_prompt: TokenArray | None  # see ``RowsBuilder.append``

    @property
    def key(self) -> tuple[bytes, bytes | None]:
        """Of pairs of a row that are one group."""
        return self.pair.prompt.tobytes(), None if self.own_prompt is None else self.own_prompt.tobytes()


def _by_prompt(made: Sequence[_Made | RowProblem]) -> Iterable[_Made | RowProblem]:
    """A row's pairs, those of one prompt beside each other: where answers of several turns begin alike, what they begin
    with belongs to the prompt of the pairs that they are in, and to no other's."""
    groups: dict[Any, list[_Made | RowProblem]] = {}
    for place, each in enumerate(made):
        groups.setdefault(place if isinstance(each, RowProblem) else each.key, []).append(each)
    return itertools.chain.from_iterable(groups.values())


@dataclass(frozen=True)
class RowTokenizer:
    """Tokenizes the rows of some sources within limits of length."""

    tokenizer: PairTokenizer
    readers: Sequence[RowReader]
    """Of each source."""
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    sources: Sequence[SourceSpec] = ()
    """For messages."""
    refuse_control_tokens: bool = False
    """See ``PairDataSettings``."""

    def __call__(self, source: int, rows: RawRows, most_pairs: int | None = None) -> TokenizedRows:
        """What becomes of rows of a source, given with their numbers; of no more than give ``most_pairs`` pairs.

        A row of several answers counts as often as it gives pairs.
        """
        builder = RowsBuilder()
        for number, raw in rows:
            row = parse_raw(raw)
            for place, made in enumerate(self._made(source, number, row)):
                if len(builder) == most_pairs:
                    return builder.finish()
                builder.outcome.add_read(place)
                if isinstance(made, RowProblem):
                    builder.add_problem(number, made)
                    continue
                assert not isinstance(row, RowProblem)
                self._add(builder, number, made)
                self._count_unread(builder, source, row, made.record)
        return builder.finish()

    def _made(self, source: int, number: int, row: Row | RowProblem) -> Iterable[_Made | RowProblem]:
        """What the pairs of a row give, each answer rendered and encoded once."""
        forms = pair_rows(row, self.readers[source])
        if len(forms) == 1:
            return self._all_encoded(source, number, forms)
        with self.tokenizer.template.remembering():
            return self._all_encoded(source, number, forms)

    def _all_encoded(self, source: int, number: int, forms: Sequence[Row | RowProblem]) -> Iterable[_Made | RowProblem]:
        found: list[_Made | RowProblem] = []
        known: Known = {}
        for form in forms:
            try:
                found.append(self._encoded(form, known))
            except RowProblem as problem:
                found.append(problem)
            except UserError as error:  # of the tokenizer, met at this row
                if not self.sources:
                    raise
                raise UserError(f"{describe_row(self.sources[source], number)}: {error}") from error
        return found if len(found) < 3 else _by_prompt(found)

    def _encoded(self, row: Row | RowProblem, known: Known) -> _Made:
        if isinstance(row, RowProblem):
            raise row
        record = parse_row(row)
        spelled_out = sorted(self.tokenizer.spelled_out(record))
        if spelled_out and self.refuse_control_tokens:
            raise RowProblem(ProblemKind.CONTROL_TOKENS, f"they hold {', '.join(spelled_out)}")
        whole = self.tokenizer.encode(record, known)
        pair = truncate(whole, self.max_prompt_tokens, self.max_response_tokens, self.tokenizer.start.tokens)
        return _Made(record, spelled_out, whole, pair, self.tokenizer.own_unconditional_prompt(record))

    def _add(self, builder: RowsBuilder, number: int, made: _Made) -> None:
        parts = zip(made.pair.parts, made.whole.parts, strict=True)
        prompt_cut, *responses_cut = (len(after) < len(before) for after, before in parts)
        has_context = any(mask is not None for mask in made.pair.scored)
        # The row's log-probs are those of the whole pair.
        if made.pair.is_one_answer:
            responses_cut = responses_cut[:1]
        has_others = prompt_cut or any(responses_cut) or has_context
        record = replace(made.record, reference=None) if has_others else made.record
        builder.append(made.pair, number, record, made.own_prompt)
        builder.outcome.truncated_prompts += prompt_cut
        builder.outcome.truncated_responses += sum(responses_cut)
        for token in made.spelled_out:
            builder.outcome.add_spelled_out(token, 1, [number])

    def _count_unread(self, builder: RowsBuilder, source: int, row: Row, record: PreferenceRecord) -> None:
        """Columns, and fields of messages, that neither we nor the chat template read."""
        names = {f"column {name}" for name in self.readers[source].unread(row)}
        if not record.is_chat:
            names |= {f"column {name}" for name in VARIABLES if row.get(name) is not None}
        for message in itertools.chain(record.prompt, record.chosen, record.rejected):
            if isinstance(message, dict):
                fields = message.keys() - {"role", "content"}
                names |= {f"messages' {field}" for field in fields if not self.tokenizer.template.reads(field)}
        builder.outcome.add_unread(names)


@dataclass(frozen=True)
class _Chunk:
    shard: int
    source: int
    rows: RawRows


def _cut(rows: Iterable[tuple[int, RawRow]]) -> Iterator[RawRows]:
    """The rows in chunks, fewer of long lines: what waits for the tokenizers is bounded in bytes too."""
    chunk: list[tuple[int, RawRow]] = []
    size = 0
    for numbered in rows:
        raw = numbered[1]
        size += len(raw) if isinstance(raw, bytes) else 0
        chunk.append(numbered)
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield tuple(chunk)
            chunk, size = [], 0
    if chunk:
        yield tuple(chunk)


class Shards:
    """Finished shards of one store to be, by number."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self, number: int) -> TokenizedRows | None:
        """None where it is not there, or not whole."""
        try:
            return TokenizedRows.from_bytes(read_regular(self._path(number), _MOST_SHARD_BYTES))
        except (OSError, ValueError):
            return None

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def save(self, number: int, rows: TokenizedRows) -> None:
        """Only an aid: where the disk is full, the store will say so."""
        with contextlib.suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(number), rows.to_bytes(), replace=False)
            tell_completed(self._path(number))

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06}.safetensors"


@dataclass(frozen=True)
class Tokenizing:
    """All rows of some sources to tokens."""

    sources: tuple[SourceSpec, ...]
    work: RowTokenizer
    shards: Shards
    workers: int | None = None
    """Processes; None: one for each core that this process may use."""
    progress: bool = True
    pause: Callable[[], None] = lambda: None
    """Called between chunks; what it raises ends the work, and whole shards are kept."""
    judge: Callable[[int, Outcome], None] = lambda source, outcome: None
    """Told what has become of each chunk's rows, as soon as they are done; may raise, as ``pause`` may."""

    def all_rows(self) -> Iterator[tuple[int, TokenizedRows]]:
        """Source and tokens, shard after shard in the rows' order."""
        for _, source, rows in self._shards(part=0, parts=1):
            yield source, rows

    def first_pairs(self, count: int) -> Iterator[tuple[int, TokenizedRows]]:
        """The same of the first ``count`` pairs, chunk after chunk, and of no row after them."""
        for chunk, done in self._done(self._chunks(part=0, parts=1)):
            self.pause()
            rows = self._made(chunk, done)
            if len(rows) >= count:  # once more, to the last pair and no further
                rows = self.work(chunk.source, chunk.rows, count)
            yield chunk.source, rows
            count -= len(rows)
            if not count:
                return

    def make_part(self, part: int, parts: int) -> None:
        """Make every ``parts``-th whole shard, from the one numbered ``part`` on, and keep it."""
        collections.deque(self._shards(part, parts), maxlen=0)

    def _shards(self, part: int, parts: int) -> Iterator[tuple[int, int, TokenizedRows]]:
        done = self._judged(self._done(self._chunks(part, parts)))
        for number, of_shard in itertools.groupby(done, key=lambda each: each[0].shard):
            chunks, results = zip(*of_shard, strict=True)
            rows = None if results[0] is not None else self.shards.load(number)
            if rows is None:  # a kept shard that is not whole is made again
                rows = join([self._made(*each) for each in zip(chunks, results, strict=True)])
                if len(chunks) == CHUNKS or parts > 1:
                    self.shards.save(number, rows)
            yield number, chunks[0].source, rows

    def _made(self, chunk: _Chunk, result: TokenizedRows | None) -> TokenizedRows:
        return self.work(chunk.source, chunk.rows) if result is None else result

    def _chunks(self, part: int, parts: int) -> Iterator[_Chunk]:
        first_shard = 0
        with self._bar() as bar:
            for source, spec in enumerate(self.sources):
                shard = first_shard
                for index, rows in enumerate(_cut(read_raw_rows(spec))):
                    shard = first_shard + index // CHUNKS
                    bar.update(len(rows))
                    if shard % parts == part:
                        yield _Chunk(shard, source, rows)
                first_shard = shard + 1

    def _judged(
        self, done: Iterator[tuple[_Chunk, TokenizedRows | None]]
    ) -> Iterator[tuple[_Chunk, TokenizedRows | None]]:
        for chunk, result in done:
            self.pause()
            if result is not None:
                self.judge(chunk.source, result.outcome)
            yield chunk, result

    def _bar(self) -> tqdm[None]:
        watched = sys.stderr.isatty()
        delay, interval = (0.0, 0.1) if watched else (_SILENT_SECONDS, _SILENT_SECONDS)
        counts = [count_rows(source) for source in self.sources] if self.progress else []
        total = sum(count or 0 for count in counts) if None not in counts else None
        return tqdm(
            desc="tokenizing pairs",
            unit=" rows",
            total=total or None,
            disable=not self.progress,
            delay=delay,
            mininterval=interval,
        )

    def _done(self, chunks: Iterator[_Chunk]) -> Iterator[tuple[_Chunk, TokenizedRows | None]]:
        """Chunks with their tokens, in order; None for those whose shard is kept."""
        few = list(itertools.islice(chunks, _FEW_CHUNKS))
        more = next(chunks, None)
        workers = self.workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        if more is None or workers == 1:
            rest = [] if more is None else [more]
            for chunk in itertools.chain(few, rest, chunks):
                yield chunk, None if self.shards.has(chunk.shard) else self.work(chunk.source, chunk.rows)
            return
        with _pool(self.work, workers) as pool:
            ahead: collections.deque[tuple[_Chunk, Future[TokenizedRows] | None]] = collections.deque()
            for chunk in itertools.chain(few, [more], chunks):
                kept = self.shards.has(chunk.shard)
                ahead.append((chunk, None if kept else pool.submit(_tokenize, chunk.source, chunk.rows)))
                if len(ahead) > _AHEAD * workers:
                    yield _result(*ahead.popleft())
            while ahead:
                yield _result(*ahead.popleft())


def _result(chunk: _Chunk, future: Future[TokenizedRows] | None) -> tuple[_Chunk, TokenizedRows | None]:
    try:
        return chunk, None if future is None else future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes pairs was killed; the machine may be short of memory. Start again: what was "
            "done is kept. --tokenizer-workers N uses fewer processes."
        ) from error


#: What the processes do, inherited when they are forked: a tokenizer may hold what cannot be sent.
_work: RowTokenizer | None = None


@contextlib.contextmanager
def _pool(work: RowTokenizer, workers: int) -> Iterator[ProcessPoolExecutor]:
    global _work
    _work = work
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns of every fork
    # fork, as torch's data loader does: a new process would import torch and Megatron for ten seconds.
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield pool
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _work = None


def _start_worker(parent: int) -> None:
    """A worker leaves signals to its parent, and dies with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _tokenize(source: int, rows: RawRows) -> TokenizedRows:
    assert _work is not None
    return _work(source, rows)
