"""The tokenized pairs of a job without the rest of it, for programs that look at data."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence

from megatron_bdpo.data.store import PairStore
from megatron_bdpo.platform.boot import prepare_platform


def tokenized_pairs(flags: Sequence[str]) -> PairStore:
    """The store of a job's training pairs, where its training looks for it; built if it is not there.

    Of a job's flags only those about pairs and tokenizer are needed. ``--hf-model`` gives the tokenizer; its weights
    are not needed. What is said on the way goes to stderr.

    Raises:
        UserError: for anything wrong with flags, tokenizer or data.
    """
    with contextlib.redirect_stdout(sys.stderr):
        prepare_platform()
        logging.getLogger("megatron").setLevel(logging.WARNING)  # not the padding of a vocabulary
        from megatron_bdpo.model.hf.directory import model_directory
        from megatron_bdpo.training import job
        from megatron_bdpo.training.distributed import process_groups
        from megatron_bdpo.training.flags import arguments

        args = arguments.parse(flags)
        args.eval_pair_data = None
        with process_groups(args):
            if args.hf_model:
                args.tokenizer_type = args.tokenizer_type or "HuggingFaceTokenizer"
                args.tokenizer_model = args.tokenizer_model or str(model_directory(args.hf_model, weights=False))
            (store,) = job.open_stores(args, job.cache_dir_of(args), report=False)
        return store
