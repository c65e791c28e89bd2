"""``megatron-bdpo data``: pair files before a training run reads them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from megatron_bdpo import display
from megatron_bdpo.cli.common import NOT_NEGATIVE, PATH, POSITIVE, example
from megatron_bdpo.data.check import check_rows
from megatron_bdpo.data.format_options import PAIRS_FROM, PREFERENCES
from megatron_bdpo.data.formats import AUTO, NAMES
from megatron_bdpo.data.prepare import excess
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.quality import DataQuality
from megatron_bdpo.data.repeats import Repeats
from megatron_bdpo.data.row_reader import FormatSettings, RowReader
from megatron_bdpo.data.sources import parse_sources
from megatron_bdpo.data.statistics import PairStatistics
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.errors import UserError, visible
from megatron_bdpo.training.entry import prepare_platform

_SHARE = click.FloatRange(min=0, max=1)


@click.group("data", epilog=example("megatron-bdpo data check pairs.jsonl"))
def data() -> None:
    """Check, tokenize and measure preference pairs and labelled answers.

    PAIRS are JSONL(.gz), Parquet or Arrow files, directories, or Hugging Face data sets.
    """


def _form(function: Any) -> Any:
    """The form of rows."""
    for add in (
        click.option("--pair-preference", type=click.Choice(PREFERENCES), help="PKU-SafeRLHF: which answer is chosen."),
        click.option("--pairs-from", metavar="|".join(PAIRS_FROM), help="Pairs of rows with ranked answers."),
        click.option("--pair-columns", metavar="OURS=THEIRS,...", help="E.g. prompt=question,chosen=answer_a."),
        click.option(
            "--pair-format",
            type=click.Choice((AUTO, *NAMES)),
            metavar="NAME",
            help="Form of the rows; auto (default): that of each source's first.",
        ),
    ):
        function = add(function)
    return function


def _pairs(function: Any) -> Any:
    """Sources, the form of their rows, and how much may be wrong with them."""
    for add in (
        click.option("--max-dropped-share", type=_SHARE, default=0.5, show_default=True, help="Unusable rows allowed."),
        click.option("--max-malformed-share", type=_SHARE, default=0.0, show_default=True, help="Broken rows allowed."),
        _form,
        click.option("--json", "as_json", is_flag=True, help="For programs."),
        click.argument("pairs", nargs=-1, required=True, metavar="PAIRS..."),
    ):
        function = add(function)
    return function


@data.command("check", epilog=example("megatron-bdpo data check pairs.jsonl --show 20"))
@_pairs
@click.option("--show", type=NOT_NEGATIVE, default=10, show_default=True, metavar="N", help="Bad rows to show.")
@click.option("--max-rows", type=POSITIVE, metavar="N", help="Look at the first N rows of each source only.")
def check(
    pairs: tuple[str, ...],
    max_dropped_share: float,
    max_malformed_share: float,
    as_json: bool,
    show: int,
    max_rows: int | None,
    **form: Any,
) -> None:
    """Count the rows, and those that give no pair by reason, with their lines.

    Without a tokenizer, so what only tokens show is for `data prepare`. Exit code 2 where a training run would stop.
    """
    left, sources = show, parse_sources(pairs)
    repeats = Repeats(sources)

    def show_problem(where: str, problem: RowProblem) -> None:
        nonlocal left
        if left and not as_json:
            left -= 1
            click.echo(visible(f"{where}: {problem}"))

    def show_format(reader: RowReader) -> None:
        if not (reader.format.is_ours or as_json):
            click.echo(visible(reader.known_from))

    given = FormatSettings.parse(**{name: value for name, value in form.items() if value is not None})
    report = check_rows(sources, show_problem, max_rows, given, show_format, repeats.see)
    if as_json:
        print(json.dumps({**report.to_json(), "repeats": repeats.found().to_json()}, indent=1))
    else:
        display.show(*report.blocks(), *repeats.found().lines())
    problem = excess(report, max_malformed_share, max_dropped_share)
    if problem:
        raise UserError(f"{problem} Correct these rows, or allow them here and in the training run with that flag.")


def _encoding(function: Any) -> Any:
    """Where the tokenizer comes from, and the limits that decide the tokens. The names are the training run's."""
    for add in (
        click.option("--unconditional-prompt", type=click.Choice(("empty", "context")), help="B-DPO's, in chats."),
        click.option("--train-on", type=click.Choice(("all-assistant", "last")), help="In answers of several turns."),
        click.option("--chat-template-kwargs", metavar="JSON", help="What the chat template reads beside messages."),
        click.option("--max-response-length", type=POSITIVE, metavar="N", help="Cut responses to so many tokens."),
        click.option("--max-prompt-length", type=POSITIVE, metavar="N", help="Cut prompts to their last N tokens."),
        click.option("--recipe", multiple=True, metavar="FILE", help="Tokenizer and limits of a recipe."),
        click.option("--tokenizer-model", metavar="PATH"),
        click.option("--tokenizer-type", metavar="TYPE", help="Megatron's, e.g. SentencePieceTokenizer."),
        click.option("--hf-revision", metavar="REVISION", help="Branch, tag or commit of an --hf-model on the hub."),
        click.option("--hf-model", metavar="PATH_OR_NAME", help="The model whose tokenizer it is; no weights needed."),
    ):
        function = add(function)
    return function


def _tokenized(function: Any) -> Any:
    """All that decides a store of tokens, and where it is."""
    for add in (
        click.option("--tokenizer-workers", type=POSITIVE, metavar="N", help="Processes (one for each core)."),
        click.option("--control-tokens", type=click.Choice(("count", "refuse")), help="Spelled out in texts."),
        click.option("--pair-cache-dir", type=PATH, metavar="DIR", help="Where tokens are kept (./runs/cache)."),
        click.option("--max-pairs", type=POSITIVE, metavar="N", help="Only the first N usable pairs."),
        _encoding,
        _pairs,
    ):
        function = add(function)
    return function


@data.command("show", epilog=example("megatron-bdpo data show pairs.jsonl --row 17 --hf-model MODEL"))
@click.option("--row", type=POSITIVE, required=True, metavar="N", help="Its number, as messages name it.")
@_encoding
@_form
@click.argument("pairs", nargs=1, metavar="FILE")
def show(row: int, pairs: str, **options: Any) -> None:
    """Show a row as a training run sees it.

    The rendered prompt and answers with | between their tokens, what of them is scored, and how long they are.
    """
    flags = _flags({**options, "pairs": (pairs,)})
    with contextlib.redirect_stdout(sys.stderr):
        prepare_platform()
    from megatron_bdpo.training.token_stores import shown_row  # imports Megatron

    display.show("\n".join(shown_row(flags, row)))


@data.command("prepare", epilog=example("megatron-bdpo data prepare pairs.jsonl --hf-model MODEL --pair-cache-dir DIR"))
@_tokenized
def prepare(**options: Any) -> None:
    """Tokenize pairs ahead of a training run.

    A training run with the same pairs, tokenizer and limits finds the tokens in its --pair-cache-dir.
    """
    (store,) = _stores(options)
    if options["as_json"]:
        print(json.dumps({"directory": str(store.directory), "report": store.report.to_json()}, indent=1))
    else:
        display.show(*store.report.blocks(), f"tokens: {store.directory}")


@data.command("stats", epilog=example("megatron-bdpo data stats pairs.jsonl --hf-model MODEL"))
@_tokenized
@click.option("--eval-pair-data", multiple=True, metavar="PATH", help="Held-out pairs, to be looked for among PAIRS.")
def stats(eval_pair_data: tuple[str, ...], **options: Any) -> None:
    """Measure pairs in tokens: their lengths, which --seq-length fits them, and their quality.

    Also how much sharing prompts saves, the safety labels, copies and near-copies, labels that contradict each other,
    what length alone says, and held-out pairs that are trained on. Tokenizes what is not yet.
    """
    stores = _stores(options, eval_pair_data)
    report, statistics, quality = stores[0].report, PairStatistics.of(stores[0]), DataQuality.of(*stores)
    if options["as_json"]:
        told = {"report": report.to_json(), "statistics": statistics.to_json(), "quality": quality.to_json()}
        print(json.dumps(told, indent=1))
    else:
        display.show(*report.blocks(), "", *statistics.blocks(), *quality.blocks())


@data.command("add-reference", epilog=example("megatron-bdpo data add-reference RUN/cache/reference-X/Y rows.jsonl"))
@click.argument("scores", type=PATH)
@click.argument("output", type=PATH)
def add_reference(scores: Path, output: Path) -> None:
    """Write the scored rows with their reference log-probs, as TRL reads them.

    SCORES is a directory that a scoring job or a training run has made, OUTPUT a new file of JSON lines: the rows with
    ref_chosen_logps and ref_rejected_logps (of labelled answers ref_logps, of responses ref_responses_logps), in nats,
    summed over the tokens of each answer.
    """
    prepare_platform()
    from megatron_bdpo.training.reference.columns import add_columns  # imports Megatron

    written, left_out = add_columns(scores, output)
    display.show(
        f"{output}: {written:,} rows" + (f"; {left_out:,} rows are not scored, or not wholly" if left_out else "")
    )


_FLAGS = (
    "hf_model",
    "hf_revision",
    "tokenizer_type",
    "tokenizer_model",
    "max_prompt_length",
    "max_response_length",
    "max_pairs",
    "chat_template_kwargs",
    "train_on",
    "unconditional_prompt",
    "tokenizer_workers",
    "pair_cache_dir",
    "pair_format",
    "pair_columns",
    "pairs_from",
    "pair_preference",
    "max_malformed_share",
    "max_dropped_share",
    "control_tokens",
)


def _stores(options: dict[str, Any], held_out: Sequence[str] = ()) -> list[PairStore]:
    """The tokenized pairs, and after them the held-out ones, through the training run's own parser and reader."""
    flags = _flags(options)
    with contextlib.redirect_stdout(sys.stderr):
        prepare_platform()
    from megatron_bdpo.training.token_stores import tokenized_pairs  # imports Megatron

    return tokenized_pairs(flags, held_out)


def _flags(options: dict[str, Any]) -> list[str]:
    """Those of a training run that say the same."""
    if not (options["hf_model"] or options["tokenizer_type"] or options["recipe"]):
        raise UserError(
            "no tokenizer is given. Name one with --hf-model, with --tokenizer-type and --tokenizer-model, or by a "
            "--recipe."
        )
    flags = [word for recipe in options["recipe"] for word in ("--recipe", recipe)]
    flags += ["--pair-data", *options["pairs"]]
    for name in _FLAGS:
        if options.get(name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(options[name])]
    return flags
