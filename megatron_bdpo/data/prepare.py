"""From sources to a `PairStore`, built once per content, tokenizer and limits, and found again in seconds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bdpo.artifact import new_directory, tell_completed, write_whole
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.row_reader import RECOGNISED, FormatSettings, row_readers
from megatron_bdpo.data.row_report import DataReport
from megatron_bdpo.data.sources import SourceSpec, content_digest, describe_row, sha256_of_file
from megatron_bdpo.data.store import FORMAT_VERSION, PairStore, PairStoreWriter, StoreInfo
from megatron_bdpo.data.tokenization import FOR_CHATS, PairTokenizer
from megatron_bdpo.data.tokenized_rows import CHATS, Outcome
from megatron_bdpo.data.tokenizing import RowTokenizer, Shards, Tokenizing
from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import Each, parse_json, schema_error
from megatron_bdpo.user_files import read_regular

_DIGESTS = "digests.json"
_RACY_SECONDS = 2.0  # a file this young may still change without a change of its time stamp


@dataclass(frozen=True)
class PairDataSettings:
    """What is read, how much of it, and how much may be wrong with it."""

    sources: tuple[SourceSpec, ...]
    """The data sets. Their weights do not concern the store: they say how often the pairs are seen."""

    cache_dir: Path
    """Where stores are kept, one directory each; several runs may share it."""

    max_prompt_tokens: int | None = None
    """Longer prompts keep their end; None: no limit."""

    max_response_tokens: int | None = None
    """Longer responses keep their beginning; None: no limit."""

    max_pairs: int | None = None
    """Stop after this many usable pairs of all sources together; None: all."""

    max_malformed_share: float = 0.0
    """Share of rows that may be broken (bad JSON, missing column, wrong type). 0: the first one stops the run."""

    max_dropped_share: float = 0.5
    """Share of rows that may give no pair, for whatever reason."""

    workers: int | None = None
    """Processes that tokenize; None: one for each core."""
    form: FormatSettings = RECOGNISED
    """Of the rows."""
    refuse_control_tokens: bool = False
    """Rows whose texts spell out a control token give no pair; else it becomes a real one, and is counted."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("--pair-data: no source is given.")
        for flag, count in (
            ("--max-prompt-length", self.max_prompt_tokens),
            ("--max-response-length", self.max_response_tokens),
            ("--max-pairs", self.max_pairs),
            ("--tokenizer-workers", self.workers),
        ):
            if count is not None and count < 1:
                raise UserError(f"{flag} must be at least 1, not {count}.")
        for flag, share in (
            ("--max-malformed-share", self.max_malformed_share),
            ("--max-dropped-share", self.max_dropped_share),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"{flag} must lie between 0 and 1, not {share}.")


def prepare_pairs(
    settings: PairDataSettings,
    tokenizer: PairTokenizer,
    progress: bool = True,
    pause: Callable[[], None] = lambda: None,
) -> PairStore:
    """Open the store of these data, building it first when there is none.

    Safe to call from several processes at once, also on different machines with a common file system: each builds on
    its own and the first to finish wins.

    Args:
        settings: of the data.
        tokenizer: of the model.
        progress: show a bar, and in a log a line from time to time.
        pause: called every second or so, while files are hashed too; what it raises ends the work, of which most is
            kept for the next call.

    Raises:
        UserError: a source cannot be read, too many rows are broken or unusable, or no pair is left.
    """
    cache_dir = Path(settings.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--pair-cache-dir: {cache_dir} cannot be made: {error.strerror or error}.") from error
    decisive = _decisive_settings(settings, tokenizer, cache_dir, pause)
    fingerprint = _fingerprint(decisive, settings.max_pairs)
    directory = cache_dir / fingerprint[:16]
    if not directory.exists():
        try:
            with new_directory(directory, first_wins=True) as partial, PairStoreWriter(partial) as writer:
                tokenizing = _tokenizing(settings, tokenizer, directory, progress, pause)
                _write_store(writer, settings, tokenizer, decisive, tokenizing)
            tell_completed(directory)
            shutil.rmtree(_shards_of(directory), ignore_errors=True)
        except OSError as error:  # failures to read come as UserError already
            raise UserError(f"--pair-cache-dir: cannot write to {cache_dir}: {error.strerror or error}.") from error
    store = PairStore.open(directory, sources=settings.sources)
    store.verify(pause)  # a flipped bit in a token would train on another text, and no later number would show it
    if store.fingerprint != fingerprint:
        raise UserError(f"{directory} holds the store of other data ({store.fingerprint}). Delete the directory.")
    # Again for a store that was found: it may have been built under more lenient limits.
    _check_shares(store.report, settings)
    return store


def _decisive_settings(
    settings: PairDataSettings, tokenizer: PairTokenizer, cache_dir: Path, pause: Callable[[], None]
) -> dict[str, Any]:
    """Everything that decides the tokens of the pairs, and nothing else; see `StoreInfo.settings`."""
    digests = _FileDigests(cache_dir / _DIGESTS, pause)
    contents = [content_digest(source, digests.of) for source in settings.sources]
    digests.save()
    return {
        "data": contents,
        **tokenizer.settings(),
        "max_prompt_length": settings.max_prompt_tokens,
        "max_response_length": settings.max_response_tokens,
        **settings.form.decisive(),
        **({"control_tokens": "refuse"} if settings.refuse_control_tokens else {}),
    }


def _fingerprint(decisive: dict[str, Any], max_pairs: int | None) -> str:
    """Hex digest of everything that decides which tokens the store holds, and of nothing else."""
    everything = {"format": FORMAT_VERSION, **decisive, "max_pairs": max_pairs}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


class _FileDigests:
    """SHA-256 of files, remembered between runs by path, size and time of change."""

    def __init__(self, path: Path, pause: Callable[[], None] = lambda: None) -> None:
        self._path, self._pause = path, pause
        self._new: dict[str, str] = {}
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):  # only an aid: without it files are read again
            known = parse_json(read_regular(path))
            if not schema_error(known, Each(str)):
                self._known = known

    def of(self, file: Path) -> str:
        status = file.stat()
        key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = sha256_of_file(file, self._pause)
            if time.time() - status.st_mtime > _RACY_SECONDS:
                self._new[key] = self._known[key]
        return self._known[key]

    def save(self) -> None:
        if not self._new:
            return
        known = {**_FileDigests(self._path)._known, **self._new}
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps(known, indent=1))


def make_part(
    settings: PairDataSettings,
    tokenizer: PairTokenizer,
    part: int,
    parts: int,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Do this node's part of what :func:`prepare_pairs` does, which finds it done. Nothing for stores that are there.

    Raises:
        UserError: as :func:`prepare_pairs`.
    """
    cache_dir = Path(settings.cache_dir).expanduser()
    fingerprint = _fingerprint(_decisive_settings(settings, tokenizer, cache_dir, pause), settings.max_pairs)
    directory = cache_dir / fingerprint[:16]
    if settings.max_pairs is None and not directory.exists():
        _tokenizing(settings, tokenizer, directory, part == 0, pause).make_part(part, parts)


def _tokenizing(
    settings: PairDataSettings, tokenizer: PairTokenizer, directory: Path, progress: bool, pause: Callable[[], None]
) -> Tokenizing:
    readers = row_readers(settings.sources, settings.form)
    limits = settings.max_prompt_tokens, settings.max_response_tokens
    work = RowTokenizer(tokenizer, readers, *limits, settings.sources, settings.refuse_control_tokens)
    shards, judge = Shards(_shards_of(directory)), functools.partial(_check_malformed, settings)
    return Tokenizing(settings.sources, work, shards, settings.workers, progress, pause, judge)


def _shards_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.shards")


def _write_store(
    writer: PairStoreWriter,
    settings: PairDataSettings,
    tokenizer: PairTokenizer,
    decisive: dict[str, Any],
    tokenizing: Tokenizing,
) -> None:
    """Tokenize all rows into the writer and finish it, unless too many are no good."""
    report = DataReport([source.path for source in settings.sources])
    form = ""
    most = settings.max_pairs
    for source, rows in tokenizing.all_rows() if most is None else tokenizing.first_pairs(most):
        _check_malformed(settings, source, rows.outcome)
        form = _same_form(form, rows.outcome.forms, settings.sources[source])
        writer.extend(rows, source)
        report.add(source, len(rows), rows.outcome)
    if not form:
        raise UserError(f"No row of the pair data can be used.\n{_explained(report, settings)}")
    if form != CHATS and (given := [flag for name, flag in FOR_CHATS.items() if name in decisive]):
        raise UserError(f"{given[0]}: the pairs are strings, which no chat template is applied to. Leave it out.")
    report.set_lengths(writer.lengths, writer.starts, writer.label)
    _check_shares(report, settings)
    empty_prompt = tokenizer.empty_prompt(form == CHATS).tolist()
    fingerprint = _fingerprint(decisive, settings.max_pairs)
    writer.finish(StoreInfo(fingerprint, decisive, empty_prompt, settings.sources, report))


def _same_form(before: str, forms: dict[str, int], source: SourceSpec) -> str:
    """The one form that all data have: they share one empty prompt."""
    first, *others = sorted(forms, key=lambda form: (form != before, forms[form])) or [before]
    if before and first != before:
        first, others = before, [first]
    if others:
        raise UserError(
            f"{describe_row(source, forms[others[0]])} holds {others[0]}, the rows before it {first}. One run takes "
            "one form: a model learns one prompt format, and the empty prompt depends on it. Convert one of them."
        )
    return first


def _check_malformed(settings: PairDataSettings, source: int, outcome: Outcome) -> None:
    """Stop at the first malformed row where none is allowed."""
    if settings.max_malformed_share > 0:
        return
    malformed = [each for each in outcome.problems.values() if ProblemKind[each.kind].malformed]
    if malformed:
        first = min(malformed, key=lambda problem: problem.rows[0])
        where = describe_row(settings.sources[source], first.rows[0])
        raise UserError(
            f"{where}: {RowProblem(ProblemKind[first.kind], first.detail)}. Correct the row, or allow a share of "
            "broken rows with --max-malformed-share."
        )


def excess(report: DataReport, max_malformed_share: float, max_dropped_share: float) -> str | None:
    """A sentence that says that more rows are broken or dropped than allowed; None if they are not."""
    for what, share, limit, flag in (
        ("malformed", report.malformed_share, max_malformed_share, "--max-malformed-share"),
        ("dropped", report.dropped_share, max_dropped_share, "--max-dropped-share"),
    ):
        if share > limit:
            return f"{share:.1%} of the {report.counted} are {what}; {flag} allows {limit:.1%}."
    return None


def _check_shares(report: DataReport, settings: PairDataSettings) -> None:
    problem = excess(report, settings.max_malformed_share, settings.max_dropped_share)
    if problem:
        raise UserError(f"{problem}\n{_explained(report, settings)}")


def _explained(report: DataReport, settings: PairDataSettings) -> str:
    """The report, and what is wrong with the first row of each of the commonest problems."""
    lines = [report.format()]
    for problem in sorted(report.problems, key=lambda problem: -problem.count)[:3]:
        lines.append(f"{describe_row(settings.sources[problem.source], problem.rows[0])}: {problem.detail}")
    return "\n".join(lines)
