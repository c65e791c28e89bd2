"""What loss, flags and pairs of a job do not agree on: refused before a model is loaded."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from megatron_bdpo.data.pool import PairPool
from megatron_bdpo.data.selection import Selection
from megatron_bdpo.data.step_plan import IntArray
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import LossFunction
from megatron_bdpo.training.settings import Settings


def check_loss(settings: Settings, loss: LossFunction) -> None:
    """Refuse what the loss does not read, or reads too early.

    Raises:
        UserError: with the flag.
    """
    needs = loss.requirements
    if needs.all_pairs and settings.reference.is_resident:
        raise UserError(
            "--reference resident knows no scores before the first step, and an option of the loss is to follow "
            "from them (auto). Give it a value, or leave --reference out."
        )
    reads_reference = needs.reference or needs.comprehension
    if settings.reference.is_in_columns and (needs.comprehension or needs.mismatched or not needs.reference):
        others = "the unconditional log-probs too" if needs.comprehension else "those after other prompts too"
        reads = others if needs.comprehension or needs.mismatched else "no reference"
        raise UserError(
            f"--reference columns has the log-probs of answers after their prompts; --preference-loss "
            f"{settings.loss.name} reads {reads}. Leave --reference out."
        )
    if settings.reference.is_in_columns and needs.beginnings:
        raise UserError(
            "--reference columns has the log-probs of whole answers, and --ld-alpha compares their beginnings, too. "
            "Leave one of them out."
        )
    if loss.spec.takes == "groups" and settings.steps.mean_over:
        raise UserError(
            f"--mean-over {settings.steps.mean_over}: --preference-loss {settings.loss.name} is a loss of groups, and "
            "a step's mean is over them. Leave it out."
        )
    if settings.pairs.unconditional_prompt != "empty" and not needs.comprehension:
        raise UserError(
            f"--unconditional-prompt is for unconditional log-probs; --preference-loss {settings.loss.name} reads "
            "none. Leave it out."
        )
    if settings.reference.sync_reference_every and not reads_reference:
        raise UserError(
            f"--sync-reference-every moves a reference, and --preference-loss {settings.loss.name} reads none. "
            "Leave it out."
        )
    if settings.reference.reference_model and (settings.reference.is_in_columns or not reads_reference):
        raise UserError(
            "--reference-model names a reference that nobody reads: "
            + ("the rows bring its log-probs. " if reads_reference else "the loss has none. ")
            + "Leave it out."
        )


def check_groups(settings: Settings, pool: PairPool) -> None:
    """Refuse a mean over groups or pairs where they are the same.

    Raises:
        UserError: with the flag.
    """
    if settings.steps.mean_over and len(pool.grouping) == len(pool):
        raise UserError(
            f"--mean-over {settings.steps.mean_over} makes no difference: no row gives several pairs of one prompt. "
            "Leave it out, or have more pairs made of rows with ranked answers: --pairs-from all."
        )


def check_selected(
    settings: Settings, loss: LossFunction, pool: PairPool, train: Selection, held_out: Selection
) -> None:
    """Refuse groups that the loss cannot be trained on, or none.

    Raises:
        UserError: with what they are, and a way out.
    """
    pairs = pool.grouping.pairs_of(train.ids)
    if not len(pairs):
        _refuse_no_pairs(pool, train, len(pool.grouping.pairs_of(held_out.ids)))
    if loss.requirements.mismatched:
        _ = pool.prompts.other_group  # refuses a single prompt
    if loss.spec.step_targets and settings.steps.mean_over != "pairs" and len(pairs) > len(train.ids):
        raise UserError(
            f"--preference-loss {loss.spec.name} sorts a step's pairs, each of which is to count alike; in a mean over "
            "rows with several pairs they do not. Add --mean-over pairs."
        )
    if settings.reference.is_in_columns:
        _check_columns(pool, np.concatenate([train.ids, held_out.ids]))


def _refuse_no_pairs(pool: PairPool, train: Selection, held_out: int) -> NoReturn:
    why = [*train.notes, *([f"{held_out} pairs held out"] if held_out else [])]
    raise UserError(
        f"none of the {len(pool.stores[0])} usable pairs of --pair-data is left to train on: {'; '.join(why)}. Raise "
        "--seq-length, cut with --max-prompt-length and --max-response-length, hold fewer out, or choose a loss that "
        "keeps them."
    )


def _check_columns(pool: PairPool, groups: IntArray) -> None:
    """All pairs of these groups bring their reference's log-probs."""
    ids = pool.grouping.pairs_of(groups)
    missing = np.isnan(pool.pairs.reference()[ids]).any(axis=1)
    if missing.any():
        example = pool.describe(int(ids[np.argmax(missing)]))
        raise UserError(
            f"--reference columns: {int(missing.sum())} of {len(ids)} {pool.pairs.noun} bring no log-probs "
            f"({example}). Give every pair ref_chosen_logps and ref_rejected_logps, and every labelled answer "
            "ref_logps, or leave --reference out. They are of whole answers: one that a limit of length cuts, or that "
            "holds turns of others, has none."
        )
