"""What makes no sense with ``--objective reward``: each flag of it is refused by name."""

from __future__ import annotations

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.settings import Settings

#: Why a reward model does not have it -> arguments.
_WITHOUT = {
    "its loss is Bradley-Terry": ("preference_loss", "loss_file"),
    "it is measured against no reference": (
        "reference", "reference_model", "reference_cache", "step_zero_check", "unconditional_prompt",
    ),
    "it has no output layer and no log-probs": (
        "log_probs", "log_prob_chunk_size", "log_prob_kept_mib", "log_entropy", "eval_prompts", "eval_prompt_tokens",
    ),
    "all of its weights are trained: its head is none of the layers that adapters stand beside": (
        "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_scaling", "lora_type", "lora_start",
        "save_hf_merged",
    ),
}  # fmt: skip


#: Of a reward model alone.
_OWN = ("center_rewards_coefficient", "rewards", "scored_rows")


def check_objective(settings: Settings, *, trains: bool = True) -> None:
    """Refuse flags of a policy beside ``--objective reward``, and those of a reward model without it.

    Args:
        trains: the job is a training run, and does not score.

    Raises:
        UserError: naming them, with the reason.
    """
    given = settings.given
    if not settings.objective.is_reward:
        if own := [given[name] for name in _OWN if name in given]:
            raise UserError(f"{', '.join(own)}: only for reward models. Add --objective reward, or leave it out.")
        return
    _check_output(settings, trains=trains)
    without = {**_WITHOUT, "the options of preference losses are not its own": tuple(settings.loss.options)}
    problems = [
        f"  {', '.join(given[name] for name in names if name in given)}: {why}"
        for why, names in without.items()
        if any(name in given for name in names)
    ]
    if problems:
        raise UserError(
            "\n".join(["--objective reward trains a reward model. Leave these out, or train a policy:", *problems])
        )


def _check_output(settings: Settings, *, trains: bool) -> None:
    """The file that scoring writes is named, once, and by scoring alone."""
    objective, pairs = settings.objective, settings.pairs
    named = {"--rewards": objective.rewards, "--scored-rows": objective.scored_rows}
    flags = [flag for flag, file in named.items() if file]
    if trains and flags:
        raise UserError(f"{flags[0]} is where megatron-bdpo score writes. Leave it out to train.")
    if not trains and not flags:
        raise UserError(
            "--objective reward: name the file that scoring is to write with --rewards FILE; of rows whose answers "
            "nobody has judged, with --scored-rows FILE."
        )
    if len(flags) > 1:
        raise UserError(f"{' and '.join(flags)} are of different rows, pairs and unjudged answers. Leave one out.")
    if objective.scored_rows and pairs.pairs_from:
        raise UserError(
            f"--pairs-from {pairs.pairs_from} is about pairs, and --scored-rows judges each answer by itself. Leave "
            "one of them out."
        )
