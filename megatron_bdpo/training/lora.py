"""LoRA of a run: what its flags mean, and that adapters meet the weights that they were trained beside."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.digest import weights_digest
from megatron_bdpo.model.lora.lora_config import LoraConfig, parse_targets
from megatron_bdpo.model.lora.peft_format import read_config
from megatron_bdpo.model.shards import adapter_shards, is_main_copy, weight_shards
from megatron_bdpo.training.distributed import all_ranks_agree, say, sum_over_ranks
from megatron_bdpo.training.identity import RunIdentity
from megatron_bdpo.training.settings import LoraSettings, Settings

_ALPHA_PER_RANK = 2.0


def lora_config(settings: Settings) -> LoraConfig | None:
    """The adapters that a job's flags ask for, if they do.

    Raises:
        UserError: flags that contradict each other or --lora-start, or are none of a run without adapters.
    """
    config = _config(settings)
    if config and config.dropout and config.kind == "dora":
        raise UserError(
            "dropout of DoRA's inputs needs a second product with every weight. Leave --lora-dropout or --lora-type "
            "out; --lora-dropout 0 where --lora-start has one."
        )
    return config


def _config(settings: Settings) -> LoraConfig | None:
    lora = settings.lora
    if not lora.is_wanted:
        _refuse_flags_alone(settings)
        return None
    if settings.architecture.multi_latent:
        raise UserError(
            "--multi-latent-attention: adapters stand beside the projections of queries, keys and values, and it has "
            "others. Leave --lora-rank and --lora-start out: all weights are trained then."
        )
    if lora.lora_start and not settings.model.hf_model:
        raise UserError("--lora-start is read by the names of --hf-model, which is not given.")
    directories = settings.directories
    if lora.lora_start and directories.finetune and directories.load:
        raise UserError("--lora-start and --load with --finetune both say where the adapters start. Give one.")
    named = parse_targets(lora.lora_targets or "all-linear", gated=settings.architecture.gated)
    if lora.lora_start:
        return _of_start(lora, read_config(Path(lora.lora_start)), named)
    assert lora.lora_rank is not None
    return LoraConfig(
        rank=lora.lora_rank,
        alpha=_ALPHA_PER_RANK * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha,
        targets=named,
        dropout=lora.lora_dropout or 0.0,
        scaling=lora.lora_scaling or "rank",  # type: ignore[arg-type]
        kind=lora.lora_type or "lora",  # type: ignore[arg-type]
    )


def _refuse_flags_alone(settings: Settings) -> None:
    lora = settings.lora
    given = [settings.given[each.name] for each in fields(LoraSettings) if each.name in settings.given]
    if settings.reference.reference == "base":
        given.append("--reference base")
    if given:
        extra = " --save-hf writes the whole model." if lora.save_hf_merged else ""
        raise UserError(f"{', '.join(given)}: only with adapters. Add --lora-rank.{extra}")


def _of_start(lora: LoraSettings, start: LoraConfig, targets: tuple[str, ...]) -> LoraConfig:
    """The configuration of --lora-start, which the flags beside it may only repeat; dropout is the flags'."""
    told: dict[str, Any] = {
        "rank": lora.lora_rank,
        "alpha": lora.lora_alpha,
        "targets": targets if lora.lora_targets else None,
        "scaling": lora.lora_scaling,
        "kind": lora.lora_type,
    }
    wanted = replace(start, **{name: value for name, value in told.items() if value is not None})
    if differing := start.differences(wanted):
        raise UserError(
            f"--lora-start {lora.lora_start}: its adapters are not those that the flags say: {'; '.join(differing)}. "
            "Leave these flags out."
        )
    return replace(start, dropout=start.dropout if lora.lora_dropout is None else lora.lora_dropout)


def with_base(run: RunIdentity, model: list[Any], vocab_size: int) -> RunIdentity:
    """The identity of a run with adapters, completed by what they stand beside. Collective.

    Args:
        model: this rank's chunks, with the weights that the adapters are to stand beside.

    Raises:
        UserError: on every rank: a resumed run has other weights there.
    """
    digest = weights_digest(model, vocab_size)
    with all_ranks_agree():
        if run.base_weights and run.base_weights != digest:
            raise UserError(
                f"the adapters were trained beside weights with the fingerprint {run.base_weights}; "
                f"those here have {digest}. Name that run's model with --hf-model or --pretrained-checkpoint."
            )
    return replace(run, base_weights=digest)


def say_sizes(model: list[Any]) -> list[Any]:
    """A pre-wrap hook that says how large adapters and base are. Collective."""
    own = [sum(map(_size, shards(model))) for shards in (adapter_shards, weight_shards)]
    trained, frozen = map(int, sum_over_ranks(torch.tensor(own, dtype=torch.float64)))
    say(f"adapters: {trained:,} parameters are trained beside {frozen:,} frozen ones ({trained / frozen:.2%})")
    return model


def _size(shard: ShardedTensor) -> int:
    assert shard.data is not None
    return shard.data.numel() if is_main_copy(shard) else 0


def identity_part(config: LoraConfig | None) -> dict[str, Any]:
    """What of adapters makes them others, for ``RunIdentity.lora``."""
    return {} if config is None else {name: value for name, value in asdict(config).items() if name != "dropout"}
