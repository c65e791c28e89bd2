"""The pictures of single held-out pairs and answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_bdpo.report import style
from megatron_bdpo.report.figures import Picture, histogram
from megatron_bdpo.report.heldout import Evaluated, HeldOutPairs
from megatron_bdpo.report.heldout_labels import HeldOutLabels
from megatron_bdpo.report.style import CHOSEN, FAINT, HELD_OUT, NEUTRAL, REJECTED, as_png, panel, show_legend


def heldout_pictures(pairs: HeldOutPairs) -> list[Picture]:
    """Margins before and after, calibration, reward by length."""
    return [_margins(pairs), _calibration(pairs.after), _by_length(pairs.after)]


def labels_pictures(labels: HeldOutLabels) -> list[Picture]:
    """Rewards of labelled answers, by label."""
    after = labels.after
    of = {"desirable": (after.desirable, CHOSEN), "undesirable": (after.undesirable, REJECTED)}
    some = {label: drawn for label, drawn in of.items() if len(drawn[0])}
    told = f"After step {after.step}."
    return [histogram("heldout_labels", "Rewards by label", "reward", some, told, mark=0.0, unit="answers")]


def _margins(pairs: HeldOutPairs) -> Picture:
    before, after = pairs.before, pairs.after
    of = {f"after step {after.step}": (after.margins, HELD_OUT)}
    told = "Left of zero the rejected answer has the higher reward: "
    told += f"{1 - after.right:.1%} of the pairs after step {after.step}"
    if not pairs.several:
        told += "."
    elif before.is_undecided:
        told += f". After step {before.step} every margin was 0: the policy was its reference."
    else:
        of = {f"after step {before.step}": (before.margins, NEUTRAL)} | of
        told += f", {1 - before.right:.1%} after step {before.step}."
    title = "Margins before and after training" if len(of) > 1 else "Margins of the held-out pairs"
    return histogram("heldout_margins", title, "reward of chosen − rejected", of, told, mark=0.0)


def _calibration(after: Evaluated) -> Picture:
    bins = after.calibration()
    predicted, right = (np.array([getattr(each, name) for each in bins]) for name in ("predicted", "right"))
    low, high = np.array([each.interval for each in bins]).T
    with style.grid(2, 1, style.PANEL, sharex=True, height_ratios=[3, 1]) as (figure, (above, below)):
        above.set_title("Calibration")
        above.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="as sure as right")
        errors: Any = np.maximum([right - low, high - right], 0)
        above.errorbar(
            predicted, right, yerr=errors, color=HELD_OUT, marker="o", markersize=4.5, linewidth=1.4, elinewidth=0.9,
            label="held-out pairs, 95%",
        )  # fmt: skip
        above.set_ylabel("share that is right")
        above.grid(axis="y")
        below.hist(after.predicted, [0.5 + n / 40 for n in range(21)], color=NEUTRAL, alpha=0.35)
        style.whole_numbers(below.yaxis)
        below.set_xlim(0.49, 1.01)
        below.set_ylabel("pairs")
        below.set_xlabel("probability of the preferred answer, σ(|margin|)")
        show_legend(figure, above)
        caption = (
            f"Each point is {_about(bins)} held-out pairs after step {after.step}. Above the line the model is right "
            f"more often than it says, below less often. Mean distance: {after.calibration_error:.3f}. The probability "
            "is that of Bradley and Terry's model, which not every loss fits."
        )
        return Picture("calibration", caption, as_png(figure))


def _about(bins: list[Any]) -> str:
    fewest, most = min(each.pairs for each in bins), max(each.pairs for each in bins)
    return f"{most}" if fewest == most else f"{fewest} to {most}"


def _by_length(after: Evaluated) -> Picture:
    with panel("Reward by length", "tokens of the answer", "reward") as (figure, axes):
        for column, (label, color) in enumerate((("chosen", CHOSEN), ("rejected", REJECTED))):
            bins = after.by_length(column)
            tokens, rewards = [each.tokens for each in bins], [each.reward for each in bins]
            lower, upper = zip(*(each.quartiles for each in bins), strict=True)
            axes.fill_between(tokens, lower, upper, color=color, alpha=0.15, linewidth=0)
            axes.plot(tokens, rewards, color=color, marker="o", markersize=4, label=label)
        axes.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        show_legend(figure, axes)
        shares = "; ".join(
            f"where it is {words}, {share:.1%} of {pairs:,}" for words, share, pairs in after.right_by_length()
        )
        caption = "Means of equally many answers each, and their middle halves."
        if shares:
            caption += f" Pairs that are right, by the chosen answer: {shares}."
        return Picture("reward_by_length", caption, as_png(figure))
