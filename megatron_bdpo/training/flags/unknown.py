"""A word that is no flag: what it is likely to mean, here or in the trainers that people come from."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from megatron_bdpo.errors import UserError

#: What TRL's DPOConfig, ms-swift and NeMo-RL call it -> what it is here; docs/migrating.md has more.
ELSEWHERE = {
    "per_device_train_batch_size": "--pairs-per-step: the pairs of an optimizer step, over all ranks",
    "per_device_eval_batch_size": "nothing: every evaluation covers all held-out pairs",
    "gradient_accumulation_steps": "--pairs-per-step: the pairs of an optimizer step; packs follow from it",
    "loss_type": "--preference-loss",
    "pref_loss": "--preference-loss",
    "loss_weights": "--preference-loss, as in dpo=0.8,sft=0.2",
    "num_train_epochs": "--pair-epochs",
    "max_epochs": "--pair-epochs",
    "max_steps": "--train-iters",
    "learning_rate": "--lr",
    "lr_scheduler_type": "--lr-decay-style",
    "warmup_steps": "--lr-warmup-iters, or --lr-warmup-fraction for a share of the steps",
    "warmup_ratio": "--lr-warmup-fraction",
    "max_grad_norm": "--clip-grad",
    "max_length": "--seq-length, the length of a pack: the longest pair's prompt and both answers have to fit",
    "packing_length": "--seq-length, the length of a pack",
    "max_completion_length": "--max-response-length",
    "packing": "nothing: pairs are packed; --no-pack-pairs leaves it",
    "padding_free": "nothing: pairs are packed; --no-pack-pairs leaves it",
    "model": "--hf-model",
    "model_name_or_path": "--hf-model",
    "dataset": "--pair-data",
    "dataset_name": "--pair-data",
    "split_dataset_ratio": "--eval-share",
    "columns": "--pair-columns",
    "output_dir": "--save, and --save-hf for the model",
    "resume_from_checkpoint": "--load",
    "save_steps": "--save-interval",
    "eval_steps": "--eval-interval",
    "eval_on_start": "--eval-at-start",
    "logging_steps": "--log-interval",
    "report_to": "--tensorboard-dir, or --wandb-project",
    "rpo_alpha": "--nll-weight",
    "cpo_alpha": "--nll-weight",
    "simpo_gamma": "--simpo-gamma",
    "alpha": "--alphapo-alpha, of --preference-loss alphapo",
    "pref_beta": "--beta",
    "rl_beta": "--beta",
    "pref_ftx": "--nll-weight",
    "f_divergence_type": "--f-divergence",
    "kto_chosen_weight": "--desirable-weight",
    "kto_rejected_weight": "--undesirable-weight",
    "desirable_loss_weight": "--desirable-weight",
    "undesirable_loss_weight": "--undesirable-weight",
    "reward_model": "--hf-model, with --objective reward",
    "ref_model_sync_steps": "--sync-reference-every",
    "ref_model_mixup_alpha": "--sync-reference-mix",
    "sync_ref_model": "--reference resident with --sync-reference-every",
    "reference_policy_kl_penalty": "--beta",
    "sft_loss_weight": "--nll-weight",
    "precompute_ref_log_probs": "--reference precomputed, which is the default",
    "ref_model": "--reference-model",
    "ref_load": "--reference-model",
    "lora_r": "--lora-rank",
    "target_modules": "--lora-targets",
    "use_rslora": "--lora-scaling sqrt-rank",
    "use_dora": "--lora-type dora",
    "gradient_checkpointing": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "save_safetensors": "--save-hf DIR",
}


def meaning(word: str, flags: Iterable[str]) -> str:
    """A sentence on what a word that is no flag may mean; empty where nothing is near.

    Args:
        word: as it was given, with or without dashes.
    """
    name = word.lstrip("-").split("=")[0]
    if here := ELSEWHERE.get(name.replace("-", "_")):
        return f"What other trainers call {name.replace('-', '_')} is {here}."
    near = difflib.get_close_matches(f"--{name.replace('_', '-')}", list(flags), n=1)
    return f"Did you mean {near[0]}?" if near else ""


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In place of argparse's own way out, which is to print 700 lines of usage on every rank."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    words = [word.strip(":,") for word in message.split()]
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in flags]
    near = [found for word in unknown if (found := meaning(word, flags))]
    raise UserError(" ".join([f"{message}.", *near, "(--help-all lists all flags.)"]))


def loss_meaning(name: str, elsewhere: dict[str, list[str]]) -> str:
    """A sentence on what a loss that is not there may mean.

    Args:
        elsewhere: the losses, each with its names in other trainers.
    """
    for own, others in elsewhere.items():
        if name in others:
            return f"What other trainers call {name} is --preference-loss {own}."
    near = difflib.get_close_matches(name, list(elsewhere), n=1)
    return f"Did you mean {near[0]}?" if near else ""
