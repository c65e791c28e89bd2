"""The tokenized pairs of a job: found in the cache, or made; rank 0 reads, all ranks map its files."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build_megatron_tokenizer

from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.pair_view import pack_view, pair_view, without_repeats
from megatron_bdpo.data.prepare import PairDataSettings, make_part, prepare_pairs
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.quality import leak
from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.row_reader import (
    FormatSettings,
    pair_rows,
    refuse_other_rows,
    refuse_unused,
    row_of,
    row_readers,
)
from megatron_bdpo.data.sources import Row, check_sources, describe_row, parse_sources
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.token_pieces import TokenPieces
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.data.tokenizing import RowTokenizer
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.directory import model_directory, tokenizer_directory
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, gather, is_rank_zero, process_groups, say
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.nodes import first_rank_of_node, is_first_of_node, on_every_node, shared_by_every_node
from megatron_bdpo.training.phases import phase
from megatron_bdpo.training.settings import PairSettings, Settings
from megatron_bdpo.training.stopping import StopRequest, listening


def cache_directory(settings: Settings) -> Path:
    """Where tokens and reference values are kept."""
    if settings.pairs.pair_cache_dir:
        return Path(settings.pairs.pair_cache_dir)
    save = settings.directories.save
    return Path(save) / "cache" if save else Path("runs") / "cache"


def open_stores(arguments: Arguments, *, report: bool = True) -> list[PairStore]:
    """The pairs of training and, where they have sources of their own and are evaluated, the held-out ones. Collective.

    Raises:
        UserError: on every rank, for anything wrong with tokenizer or data.
        StopRequested: on every rank; what was tokenized is kept.
    """
    settings = arguments.settings
    pairs, cache = settings.pairs, cache_directory(settings)
    held_out = pairs.eval_pair_data if settings.schedule.evaluates else None
    wanted: list[PairDataSettings] = []
    directories: list[str] = []
    with all_ranks_agree():
        for paths, limit in ((pairs.pair_data, pairs.max_pairs), (held_out, None)):
            if paths:
                wanted.append(_data_settings(settings, paths, limit, cache))
                if is_rank_zero():
                    check_sources(wanted[-1].sources)
        if is_rank_zero():
            _refuse_unused_options(wanted)
    shared_by_every_node("--pair-cache-dir", cache)
    tokenizer = _tokenizer_of_every_node(arguments)
    stop = StopRequest.of(settings)
    with phase("tokenizing"), listening(settings.schedule.exit_signal):
        _make_parts(arguments, wanted, stop)
        with all_ranks_agree(), stop.working_alone():
            if tokenizer:
                pause = stop.leave_alone_if_asked
                directories = [str(prepare_pairs(each, tokenizer, pause=pause).directory) for each in wanted]
        stop.leave_together()
    with all_ranks_agree():
        # Every rank maps the files that rank 0 has written: ranks of one node share the pages.
        stores = [
            PairStore.open(directory, sources=each.sources)
            for directory, each in zip(broadcast(directories), wanted, strict=True)
        ]
    if report:
        for name, store in zip(("training pairs", "held-out pairs"), stores, strict=False):
            say("", name, *store.report.blocks())
        if len(stores) > 1 and is_rank_zero() and (leaked := leak(*stores)).count:
            say(
                f"WARNING: the prompts of {leaked.count:,} of {leaked.of:,} held-out pairs are trained on "
                f"({leaked.example}); megatron-bdpo data stats --eval-pair-data tells more"
            )
    return stores


def _tokenizer_of_every_node(arguments: Arguments) -> PairTokenizer | None:
    """Rank 0's, and the arguments name one that this rank's node has: Megatron builds it on every rank. Collective."""
    tokenizer, named = None, arguments.settings.tokenizer.model
    with all_ranks_agree():
        if is_rank_zero():
            tokenizer = pair_tokenizer(arguments)
    if named:
        found = str(arguments.settings.tokenizer.model)
        arguments.set(tokenizer_model=on_every_node("--tokenizer-model", named, found, tokenizer_directory))
    return tokenizer


def _make_parts(arguments: Arguments, wanted: list[PairDataSettings], stop: StopRequest) -> None:
    """With several nodes, those that see the data tokenize a part each; rank 0 finds them. Collective."""
    if len(set(gather(first_rank_of_node()))) == 1:
        return
    rank = first_rank_of_node()
    parts = sorted(set(gather(rank if is_first_of_node() and _sees(wanted) else -1)) - {-1})
    with all_ranks_agree(), stop.working_alone():
        if is_first_of_node() and rank in parts and len(parts) > 1:
            tokenizer = pair_tokenizer(arguments)
            for each in wanted:
                make_part(each, tokenizer, parts.index(rank), len(parts), stop.leave_alone_if_asked)
    stop.leave_together()


def _sees(wanted: list[PairDataSettings]) -> bool:
    """Whether the data are on this node, too."""
    try:
        for each in wanted:
            check_sources(each.sources)
    except UserError:
        return False
    return True


def pair_tokenizer(arguments: Arguments) -> PairTokenizer:
    """What makes tokens of the pairs of these arguments.

    Raises:
        UserError: it cannot be built.
    """
    return make_pair_tokenizer(build_tokenizer(arguments), arguments.settings.pairs)


def make_pair_tokenizer(library: Any, pairs: PairSettings) -> PairTokenizer:
    """The same around a tokenizer of Megatron's."""
    return PairTokenizer(
        library,
        pairs.template_variables,
        pairs.train_on,
        unconditional_context=pairs.unconditional_prompt == "context",
    )


def _data_settings(settings: Settings, paths: list[str], limit: int | None, cache: Path) -> PairDataSettings:
    pairs = settings.pairs
    return PairDataSettings(
        sources=parse_sources(paths),
        cache_dir=cache,
        max_prompt_tokens=pairs.max_prompt_length,
        max_response_tokens=pairs.max_response_length,
        max_pairs=limit,
        max_malformed_share=pairs.max_malformed_share,
        max_dropped_share=pairs.max_dropped_share,
        workers=pairs.tokenizer_workers,
        refuse_control_tokens=pairs.control_tokens == "refuse",
        form=form_of_rows(settings),
    )


def form_of_rows(settings: Settings) -> FormatSettings:
    """What the job says of the form of its rows."""
    pairs = settings.pairs
    return FormatSettings.parse(
        pairs.pair_format,
        pairs.pair_columns,
        pairs.pairs_from,
        pairs.pair_preference,
        usual_pairs_from=_ALL if settings.compares_groups else FormatOptions.pairs_from,
        each_answer=settings.objective.scored_rows is not None,
    )


#: Pairs that name every answer.
_ALL = "all"


def _refuse_unused_options(wanted: list[PairDataSettings]) -> None:
    """See ``refuse_unused``: what makes a difference to some source, of training or held out, is no mistake."""
    for each in wanted:
        if each.form.each_answer:
            refuse_other_rows(row_readers(each.sources, each.form), each.sources, "--scored-rows")
    for form in {each.form for each in wanted if each.form.pairs_from or each.form.preference}:  # they have one
        refuse_unused(form, [reader for each in wanted for reader in row_readers(each.sources, form)])


def build_tokenizer(arguments: Arguments) -> Any:
    """Megatron's tokenizer of these arguments. A name on the hub becomes the directory that it has been fetched to.

    Raises:
        UserError: it cannot be built.
    """
    tokenizer = arguments.settings.tokenizer
    if tokenizer.type == "HuggingFaceTokenizer" and tokenizer.model:
        arguments.set(tokenizer_model=str(tokenizer_directory(tokenizer.model)))
    elif tokenizer.model and (path := Path(tokenizer.model)).exists() and not (path.is_dir() or path.is_file()):
        raise UserError(f"--tokenizer-model {path} is no regular file. Name the file itself.")
    try:
        return build_megatron_tokenizer(arguments.copy().megatron)  # it writes the vocabulary size into its argument
    # NameError: its library is not installed; RuntimeError: sentencepiece's, for a file that is no model
    except (ValueError, OSError, TypeError, NameError, ImportError, RuntimeError) as error:
        if isinstance(error, ImportError | NameError):
            advice = "For Hugging Face tokenizers: pip install 'megatron_bdpo[hf]'."
        elif "trust_remote_code" in str(error):
            advice = "It brings code of its own, which is not run unless you trust it: --trust-remote-code."
        else:
            advice = "Name a tokenizer's file or directory, whole, and its type."
        raise UserError(
            f"the tokenizer cannot be built (--tokenizer-type {tokenizer.type}, --tokenizer-model "
            f"{tokenizer.model}). {advice} Its library says: {' '.join(str(error).split())}"
        ) from error


def tokenized_pairs(flags: Sequence[str], held_out: Sequence[str] = ()) -> list[PairStore]:
    """The store of a job's training pairs without the rest of the job, for programs that look at data.

    A second one holds the pairs of the sources ``held_out``, if there are any, whatever the flags say of such pairs.

    Of a job's flags only those about pairs and tokenizer are needed. ``--hf-model`` gives the tokenizer; its weights
    are not needed. What is said on the way goes to stderr.

    Raises:
        UserError: for anything wrong with flags, tokenizer or data.
    """
    with contextlib.redirect_stdout(sys.stderr):
        logging.getLogger("megatron").setLevel(logging.WARNING)  # not the padding of a vocabulary
        arguments = Arguments.parse(flags)
        arguments.set(eval_pair_data=list(held_out) or None, eval_iters=None)
        settings = arguments.settings
        with process_groups(settings.process):
            return tokenize(arguments, report=False)


def shown_row(flags: Sequence[str], number: int) -> list[str]:
    """A row of a job's training data as the job sees it, in lines. Flags of pairs and tokenizer are enough.

    Raises:
        UserError: for anything wrong with flags, tokenizer or data; there is no such row, or it gives no pair.
    """
    with contextlib.redirect_stdout(sys.stderr):
        logging.getLogger("megatron").setLevel(logging.WARNING)
        arguments = Arguments.parse(flags)
        _name_tokenizer(arguments)
        pairs = arguments.settings.pairs
        settings = _data_settings(arguments.settings, pairs.pair_data or [], None, cache_directory(arguments.settings))
        (source,), (reader,) = settings.sources, row_readers(settings.sources, settings.form)
        library = build_tokenizer(arguments)
        tokenizer, pieces = make_pair_tokenizer(library, pairs), TokenPieces(library)
    where, row = describe_row(source, number), row_of(source, number)
    limits = settings.max_prompt_tokens, settings.max_response_tokens
    shown, problems = [], []
    for record in pair_rows(row, reader):
        try:
            shown.append(_shown_pair(record, tokenizer, pieces, *limits))
        except RowProblem as problem:
            problems.append(problem)
            shown.append([f"not used: {problem}"])
    if len(problems) == len(shown):
        raise UserError(f"{where} gives no pair: {problems[0]}. `megatron-bdpo data check` counts such rows.")
    lines = [f"{where}: {reader.format.name}"]
    for place, of_pair in enumerate(without_repeats(shown), start=1):
        lines += ["", f"pair {place} of {len(shown)}", *of_pair] if len(shown) > 1 else of_pair
    assert not isinstance(row, RowProblem)
    tokenized = RowTokenizer(tokenizer, [reader], *limits)(0, [(number, row)])
    return [*lines, *([""] if len(shown) > 1 else []), *pack_view(tokenized)]


def _shown_pair(
    record: Row | RowProblem,
    tokenizer: PairTokenizer,
    pieces: TokenPieces,
    max_prompt_tokens: int | None,
    max_response_tokens: int | None,
) -> list[str]:
    if isinstance(record, RowProblem):
        raise record
    parsed = parse_row(record)
    spelled_out = sorted(tokenizer.spelled_out(parsed))
    told = [f"control tokens in texts, taken as such: {', '.join(spelled_out)}"] if spelled_out else []
    return told + pair_view(parsed, tokenizer, pieces, max_prompt_tokens, max_response_tokens)


def _name_tokenizer(arguments: Arguments) -> None:
    """Of ``--hf-model``, whose tokenizer it is. Its weights are not needed."""
    settings = arguments.settings
    if settings.model.hf_model:
        named, revision = settings.model.hf_model, settings.model.hf_revision
        model = settings.tokenizer.model or str(model_directory(named, revision, weights=False))
        arguments.set(tokenizer_type=settings.tokenizer.type or "HuggingFaceTokenizer", tokenizer_model=model)


def tokenize(arguments: Arguments, *, report: bool = True) -> list[PairStore]:
    """:func:`open_stores` without the rest of the job: ``--hf-model`` gives the tokenizer. Collective."""
    with all_ranks_agree():
        _name_tokenizer(arguments)
    return open_stores(arguments, report=report)
