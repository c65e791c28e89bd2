"""The pictures of a report. Each has one message, named axes with units, and a legend where it needs one."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bdpo.data.length_bias import LengthBias
from megatron_bdpo.data.quality import DataQuality
from megatron_bdpo.report import style
from megatron_bdpo.report.curves import QUARTILES, Curves, Series, smoothed
from megatron_bdpo.report.scored_pairs import Comprehension, FloatArray
from megatron_bdpo.report.style import (
    CHOSEN,
    FAINT,
    HELD_OUT,
    NEUTRAL,
    REJECTED,
    as_png,
    panel,
    show_legend,
)

_BINS = 60
#: What lies outside of these percentiles would only squeeze the rest; the axis says how many those are.
_SHOWN = (0.2, 99.8)
#: From this many points on, a curve is drawn faintly and its running mean over it.
_MANY_POINTS = 60


@dataclass(frozen=True)
class Picture:
    """A picture and what one sees in it."""

    name: str
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        """The file as text, for a page."""
        return base64.b64encode(self.png).decode("ascii")


# Comprehension --------------------------------------------------------------------------------------------------------


def comprehension_pictures(pairs: Comprehension) -> list[Picture]:
    """Distributions of comprehension, of the imbalance, and of the weights and scales that follow."""
    w_w, w_l = pairs.weights.T
    far = (np.abs(w_w - 1) > _BALANCED).mean()
    tau = f"τ = {pairs.temperature:.4g}"
    q25, q50, q75 = np.percentile(np.abs(pairs.difference), [25, 50, 75])
    return [
        histogram(
            "comprehension",
            "What the prompt tells about the answer",
            f"I(x; y) under the reference, {pairs.unit}",
            {"chosen, $I_w$": (pairs.chosen, CHOSEN), "rejected, $I_l$": (pairs.rejected, REJECTED)},
            f"Comprehension of chosen (mean {pairs.chosen.mean():.3f}) and rejected (mean {pairs.rejected.mean():.3f}) "
            f"responses, {pairs.unit}. Below zero the prompt makes the response less likely.",
        ),
        histogram(
            "imbalance",
            "How unequal the two answers of a pair are",
            f"$I_w - I_l$, {pairs.unit}",
            {"": (pairs.difference, NEUTRAL)},
            f"Imbalance. Right of zero the chosen response is understood better: {(pairs.difference > 0).mean():.0%} "
            f"of the pairs. Quartiles of |I_w − I_l|: {q25:.3f}, {q50:.3f}, {q75:.3f}.",
            mark=0.0,
        ),
        histogram(
            "weights",
            f"Balanced weights at {tau}",
            "weight in the loss (1: plain DPO)",
            {"chosen, $w_w$": (w_w, CHOSEN), "rejected, $w_l = 2 - w_w$": (w_l, REJECTED)},
            f"Weights at {tau}. Half of the pairs have w_w between {np.percentile(w_w, 25):.3f} and "
            f"{np.percentile(w_w, 75):.3f}; {far:.0%} are more than {_BALANCED} off 1.",
            mark=1.0,
            bounded=True,
        ),
        histogram(
            "scale",
            f"Scaling factor at {tau}",
            "s, in (0.71, 1]; 1: nothing to balance",
            {"": (pairs.scale, NEUTRAL)},
            f"Scale at {tau}: mean {pairs.scale.mean():.3f}, least {pairs.scale.min():.3f}.",
            bounded=True,
        ),
    ]


_BALANCED = 0.1


def histogram(
    name: str,
    title: str,
    x: str,
    of: dict[str, tuple[FloatArray, str]],
    caption: str,
    mark: float | None = None,
    bounded: bool = False,
    unit: str = "pairs",
) -> Picture:
    """Distributions of pairs, or of another ``unit``, in bins that they share; without a label there is one, and the
    axis names it."""
    edges, outside = _edges(np.concatenate([values for values, _ in of.values()]), bounded=bounded)
    if outside:
        x += f"  ({outside} outside of the picture)"
    with panel(title, x, unit) as (figure, axes):
        style.whole_numbers(axes.yaxis)
        for label, (values, color) in of.items():
            axes.hist(values, edges, histtype="stepfilled", color=color, alpha=0.22)
            axes.hist(values, edges, histtype="step", color=color, linewidth=1.5, label=label or None)
        shown = [edges[0], edges[-1]]
        if mark is not None:
            axes.axvline(mark, color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)))
            room = 0.02 * (edges[-1] - edges[0])
            shown = [min(edges[0], mark - room), max(edges[-1], mark + room)]
        axes.set_xlim(*shown)
        axes.set_ylim(bottom=0)
        show_legend(figure, axes)
        return Picture(name, caption, as_png(figure))


def _edges(values: FloatArray, *, bounded: bool) -> tuple[list[float], int]:
    """Edges of the bins, and how many values are outside of them; none where values are bounded."""
    few = len(values) <= _BINS
    low, high = (values.min(), values.max()) if bounded or few else np.percentile(values, _SHOWN)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, min(_BINS, max(5, round(2 * len(values) ** 0.4))) + 1)
    return edges.tolist(), int(((values < low) | (values > high)).sum())


# Quality --------------------------------------------------------------------------------------------------------------


def quality_pictures(quality: DataQuality) -> list[Picture]:
    """How much longer chosen answers are, and which shares of the rows have something wrong with them."""
    lengths = [_length_picture(quality.length)] if quality.length else []
    found, what = quality.rows()[::-1], quality.what
    with panel(f"What is wrong with the {what}", "share, %", "") as (figure, axes):
        shares = [100 * each.share for _, each in found]
        bars = axes.barh([words for words, _ in found], shares, color=REJECTED, height=0.6)
        axes.bar_label(bars, [f"{each.count:,}" for _, each in found], padding=3)
        axes.set_xlim(0, max(1.0, 1.15 * max(shares)))
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", labelsize=8)
        caption = f"Shares of the {what} or prompts that were looked at; beside each bar their number."
        return [*lengths, Picture("quality", caption, as_png(figure))]


def _length_picture(bias: LengthBias) -> Picture:
    outside = bias.compared - sum(bias.pairs)
    x = "tokens of chosen − rejected" + (f"  ({outside} outside of the picture)" if outside else "")
    with panel("How much longer the chosen answer is", x, "pairs") as (figure, axes):
        style.whole_numbers(axes.yaxis)
        axes.stairs(bias.pairs, bias.edges, fill=True, color=NEUTRAL, alpha=0.22)
        axes.stairs(bias.pairs, bias.edges, color=NEUTRAL, linewidth=1.5)
        axes.axvline(0, color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        caption = (
            f"Right of zero the chosen answer is longer: {bias.longer:.0%} of the pairs; on average it is by "
            f"{bias.mean_difference:+.1f} tokens. A judge who knows nothing but lengths is right in {bias.rule:.0%}."
        )
        return Picture("length_difference", caption, as_png(figure))


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plot:
    name: str
    title: str
    y: str
    lines: dict[str, tuple[str, str]]
    """Legend -> metric, colour."""
    caption: str
    mark: float | None = None
    wide: bool = False
    """May range over orders of magnitude."""


_PLOTS = (
    _Plot("loss", "Loss", "loss, nats", {"training": ("loss", NEUTRAL)}, "The preference loss, mean over pairs."),
    _Plot(
        "accuracy", "Accuracy", "share of pairs", {"training": ("rewards/accuracies", NEUTRAL)},
        "Pairs whose chosen response has the higher reward; one half is chance.", mark=0.5,
    ),
    _Plot(
        "margin", "Reward margin", "reward of chosen − rejected", {"training": ("rewards/margins", NEUTRAL)},
        "Mean difference of the rewards of chosen and rejected.", mark=0.0,
    ),
    _Plot(
        "rewards", "Rewards", "reward",
        {"chosen": ("rewards/chosen", CHOSEN), "rejected": ("rewards/rejected", REJECTED)},
        "Mean rewards. The margin can grow while both fall.", mark=0.0,
    ),
    _Plot(
        "logps", "Log-probs of the answers", "log-prob, nats per response",
        {"chosen": ("logps/chosen", CHOSEN), "rejected": ("logps/rejected", REJECTED)},
        "Mean log-probs under the policy, summed over the response.",
    ),
    _Plot(
        "grad_norm", "Gradient norm", "L2 norm before clipping", {"training": ("grad_norm", NEUTRAL)},
        "Norm of the whole gradient, before clipping.", wide=True,
    ),
)  # fmt: skip

_BY_QUARTILE = (
    ("rewards/accuracies", "Accuracy by imbalance", "share of pairs", 0.5),
    ("rewards/margins", "Reward margin by imbalance", "reward of chosen − rejected", 0.0),
)


def training_pictures(curves: Curves) -> list[Picture]:
    """Curves of what the run has reported, held-out pairs included."""
    plots = [plot for plot in _PLOTS if curves.has(metric for metric, _ in plot.lines.values())]
    return [*(_curve(plot, curves) for plot in plots), *_quartile_pictures(curves)]


def _curve(plot: _Plot, curves: Curves) -> Picture:
    with panel(plot.title, "optimizer step", plot.y) as (figure, axes):
        for label, (metric, color) in plot.lines.items():
            several = len(plot.lines) > 1
            _draw(axes, curves.training.get(metric), color, label)
            _draw_held_out(
                axes, curves.held_out.get(metric), color if several else HELD_OUT,
                f"{label}, held out" if several else "held out",
            )  # fmt: skip
        _finish(figure, axes, plot.mark, wide=plot.wide)
        return Picture(plot.name, plot.caption, as_png(figure))


def _quartile_pictures(curves: Curves) -> list[Picture]:
    pictures = []
    for metric, title, y, mark in _BY_QUARTILE:
        names = [f"{metric}/imbalance_{q}" for q in QUARTILES]
        held_out = any(name in curves.held_out for name in names)
        found = curves.held_out if held_out and len(curves.held_out["loss"]) > _FEW else curves.training
        if not any(name in found for name in names):
            continue
        which = "held-out pairs" if found is curves.held_out else "training pairs"
        with panel(f"{title}, {which}", "optimizer step", y) as (figure, axes):
            for q, (name, color) in enumerate(zip(names, style.QUARTILES, strict=True), 1):
                label = f"Q{q}" + {1: ", least imbalanced", 4: ", most imbalanced"}.get(q, "")
                _draw(axes, found.get(name), color, label, raw=False)
            _finish(figure, axes, mark)
            caption = f"By quartile of the training pairs' |I_w − I_l|; {which}."
            name = metric.rpartition("/")[2] + "_by_imbalance"
            pictures.append(Picture(name, caption, as_png(figure)))
    return pictures


#: Held-out pairs are shown by quartile if they were evaluated more often than this; a curve needs points.
_FEW = 3


def _draw(axes: Any, series: Series | None, color: str, label: str, *, raw: bool = True) -> None:
    if series is None:
        return
    width = max(5, len(series) // 20) if len(series) >= _MANY_POINTS else 1
    if width > 1 and raw:
        axes.plot(series.iterations, series.values, color=color, alpha=0.25, linewidth=0.8)
    mean = smoothed(series, width)
    marker = {"marker": "o", "markersize": 3} if len(series) < _FEW else {}
    axes.plot(mean.iterations, mean.values, color=color, label=label, **marker)


def _draw_held_out(axes: Any, series: Series | None, color: str, label: str) -> None:
    if series is not None:
        axes.plot(
            series.iterations, series.values, color=color, linestyle=(0, (1, 1.5)), linewidth=1.4, marker="o",
            markersize=4.5, markerfacecolor="white", markeredgewidth=1.4, label=label,
        )  # fmt: skip


def _finish(figure: Any, axes: Any, mark: float | None, *, wide: bool = False) -> None:
    if mark is not None:
        axes.axhline(mark, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    style.whole_numbers(axes.xaxis)
    if wide:
        style.logarithmic_if_wide(axes)
    show_legend(figure, axes)
