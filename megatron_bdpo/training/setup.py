"""What every run begins with, whether it trains or only scores: the job, what it resumes, the model's first weights."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.model.initialization import initialize_by_name
from megatron_bdpo.model.pair_gpt import PairGPTConfig
from megatron_bdpo.training import identity
from megatron_bdpo.training.hf.start import weights_loader
from megatron_bdpo.training.identity import RunIdentity
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.preparation import forget_global_state, prepare


@dataclass
class RunSetup:
    """A run before its model exists. ``args`` are validated.

    Attributes:
        job: loss, pairs and plan.
        config: of policy and reference.
        scoring: how positions are scored; its vocabulary is the tokenizer's.
        identity: of this run, or of the one that it resumes.
        resumed: there is a checkpoint of this run to go on from.
    """

    args: argparse.Namespace
    job: PairJob
    config: PairGPTConfig
    scoring: TokenScoring
    identity: RunIdentity
    resumed: bool

    def add_initial_weights(self) -> None:
        """Where there is no checkpoint to load, have the model filled as it is built. Collective."""
        if any(map(identity.checkpoint_directory, (self.args.load, self.args.pretrained_checkpoint))):
            return
        if self.args.hf_model:
            self.config.transformer.perform_initialization = False
            self.config.pre_wrap_hooks.append(weights_loader(self.args.hf_model))
        else:
            self.config.pre_wrap_hooks.append(functools.partial(initialize_by_name, seed=self.args.seed))


def set_up(args: argparse.Namespace) -> RunSetup:
    """Prepare the job, and find out what it resumes. Collective.

    Raises:
        UserError: on every rank.
    """
    job, config = prepare(args)
    scoring = TokenScoring(
        args.scored_vocab_size,
        kernel=args.log_probs,
        chunk_size=args.log_prob_chunk_size,
        kept_bytes=None if args.log_prob_kept_mib is None else args.log_prob_kept_mib * 2**20,
    )
    current = identity.identity_of(args, job)
    try:
        found = identity.resumed_identity(args, current)
    except UserError:
        forget_global_state()
        raise
    return RunSetup(args, job, config, scoring, found or current, resumed=found is not None)
