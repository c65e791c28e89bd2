"""A table per trainer: what each of its keys is here. Data alone; ``translation`` reads them."""

from megatron_bdpo.migrate.entries import Source
from megatron_bdpo.migrate.tables.axolotl import AXOLOTL
from megatron_bdpo.migrate.tables.llama_factory import LLAMA_FACTORY
from megatron_bdpo.migrate.tables.nemo_rl import NEMO_RL, NEMO_RL_RM
from megatron_bdpo.migrate.tables.openrlhf import OPENRLHF, OPENRLHF_KTO, OPENRLHF_RM
from megatron_bdpo.migrate.tables.swift import MEGATRON_SWIFT, SWIFT
from megatron_bdpo.migrate.tables.trl import TRL, TRL_BCO, TRL_CPO, TRL_KTO, TRL_ORPO, TRL_REWARD

SOURCES: tuple[Source, ...] = (
    TRL, TRL_CPO, TRL_ORPO, TRL_REWARD, TRL_KTO, TRL_BCO, SWIFT, MEGATRON_SWIFT, LLAMA_FACTORY, AXOLOTL,
    NEMO_RL, NEMO_RL_RM, OPENRLHF, OPENRLHF_RM, OPENRLHF_KTO,
)  # fmt: skip
