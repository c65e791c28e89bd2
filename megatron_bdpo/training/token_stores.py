"""The tokenized pairs of a job: found in the cache, or made; rank 0 reads, all ranks map its files."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build_megatron_tokenizer

from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.quality import leak
from megatron_bdpo.data.sources import check_sources, parse_sources
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.directory import model_directory, tokenizer_directory
from megatron_bdpo.training.distributed import all_ranks_agree, broadcast, is_rank_zero, process_groups, say
from megatron_bdpo.training.flags.arguments import Arguments
from megatron_bdpo.training.nodes import on_every_node, shared_by_every_node
from megatron_bdpo.training.settings import PairSettings, Settings


def cache_directory(settings: Settings) -> Path:
    """Where tokens and reference values are kept."""
    if settings.pairs.pair_cache_dir:
        return Path(settings.pairs.pair_cache_dir)
    save = settings.directories.save
    return Path(save) / "cache" if save else Path("runs") / "cache"


def open_stores(arguments: Arguments, *, report: bool = True) -> list[PairStore]:
    """The pairs of training and, where they have sources of their own, the held-out ones. Collective.

    Raises:
        UserError: on every rank, for anything wrong with tokenizer or data.
    """
    settings = arguments.settings
    pairs, cache = settings.pairs, cache_directory(settings)
    wanted: list[PairDataSettings] = []
    directories: list[str] = []
    with all_ranks_agree():
        for paths, limit in ((pairs.pair_data, pairs.max_pairs), (pairs.eval_pair_data, None)):
            if paths:
                wanted.append(_data_settings(pairs, paths, limit, cache))
                if is_rank_zero():
                    check_sources(wanted[-1].sources)
    shared_by_every_node("--pair-cache-dir", cache)
    found = settings.tokenizer.model
    with all_ranks_agree():
        if is_rank_zero():
            tokenizer = PairTokenizer(build_tokenizer(arguments))
            found = arguments.settings.tokenizer.model
            directories = [str(prepare_pairs(each, tokenizer).directory) for each in wanted]
    if settings.tokenizer.model:  # Megatron builds it on every rank
        own = on_every_node("--tokenizer-model", settings.tokenizer.model, str(found), tokenizer_directory)
        arguments.set(tokenizer_model=own)
    with all_ranks_agree():
        # Every rank maps the files that rank 0 has written: ranks of one node share the pages.
        stores = [
            PairStore.open(directory, sources=each.sources)
            for directory, each in zip(broadcast(directories), wanted, strict=True)
        ]
    if report:
        for name, store in zip(("training pairs", "held-out pairs"), stores, strict=False):
            say(name, *store.report.blocks())
        if len(stores) > 1 and is_rank_zero() and (leaked := leak(*stores)).count:
            say(
                f"WARNING: the prompts of {leaked.count:,} of {leaked.of:,} held-out pairs are trained on "
                f"({leaked.example}); megatron-bdpo data stats --eval-pair-data tells more"
            )
    return stores


def _data_settings(pairs: PairSettings, paths: list[str], limit: int | None, cache: Path) -> PairDataSettings:
    return PairDataSettings(
        sources=parse_sources(paths),
        cache_dir=cache,
        max_prompt_tokens=pairs.max_prompt_length,
        max_response_tokens=pairs.max_response_length,
        max_pairs=limit,
        max_malformed_share=pairs.max_malformed_share,
        max_dropped_share=pairs.max_dropped_share,
    )


def build_tokenizer(arguments: Arguments) -> Any:
    """Megatron's tokenizer of these arguments. A name on the hub becomes the directory that it has been fetched to.

    Raises:
        UserError: it cannot be built.
    """
    tokenizer = arguments.settings.tokenizer
    if tokenizer.type == "HuggingFaceTokenizer" and tokenizer.model:
        arguments.set(tokenizer_model=str(tokenizer_directory(tokenizer.model)))
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
        arguments.set(eval_pair_data=list(held_out) or None)
        settings = arguments.settings
        with process_groups(settings.process):
            if settings.model.hf_model:
                arguments.set(
                    tokenizer_type=settings.tokenizer.type or "HuggingFaceTokenizer",
                    tokenizer_model=settings.tokenizer.model
                    or str(model_directory(settings.model.hf_model, weights=False)),
                )
            return open_stores(arguments, report=False)
