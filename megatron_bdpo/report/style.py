"""How our pictures look. The one importer of matplotlib, which is an extra: ``pip install 'megatron_bdpo[report]'``."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_bdpo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey.
CHOSEN = "#0072B2"
REJECTED = "#D55E00"
NEUTRAL = "#444444"
HELD_OUT = "#009E73"
FAINT = "#9A9A9A"
#: From the least to the most imbalanced quartile: light to dark, so that the order is seen.
QUARTILES = ("#9ECAE1", "#4292C6", "#08519C", "#08204F")

_SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": NEUTRAL,
    "ytick.color": NEUTRAL,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

#: Inches; at 150 dots per inch a panel is sharp at 400 pixels of a page.
PANEL = (5.4, 3.8)
_DOTS_PER_INCH = 150


def require_matplotlib() -> None:
    """Raises UserError where it is not installed."""
    try:
        _matplotlib()
    except ImportError as error:
        raise UserError(
            f"pictures need matplotlib, which cannot be imported ({error}): pip install 'megatron_bdpo[report]'. "
            "Without it: --text-only, or --no-plot."
        ) from error


class _Matplotlib(NamedTuple):
    """What is used of the library."""

    Figure: Callable[..., Figure]
    rc_context: Callable[..., Any]
    ticker: ModuleType


def _matplotlib() -> _Matplotlib:
    from matplotlib import figure, rc_context, ticker  # an extra, and slow to import

    return _Matplotlib(figure.Figure, rc_context, ticker)


@contextmanager
def panel(title: str, x: str, y: str, size: tuple[float, float] = PANEL) -> Iterator[tuple[Figure, Axes]]:
    """One picture with one pair of axes, in our style while the block runs."""
    with grid(1, 1, size) as (figure, (axes,)):
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y")
        yield figure, axes


@contextmanager
def grid(rows: int, columns: int, size: tuple[float, float], **settings: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """One picture with several pairs of axes, row by row; ``settings`` as for matplotlib's ``subplots``."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_SETTINGS):
        figure = matplotlib.Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **settings).flat)


def show_legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it covers nothing; none for a single thing, which the axis names."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(handles) > 2 else len(handles))


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only: steps, counts."""
    axis.set_major_locator(_matplotlib().ticker.MaxNLocator(nbins="auto", integer=True))


def logarithmic_if_wide(axes: Axes) -> None:
    """A logarithmic y axis, with plain numbers at 1, 2, 5, 10, ..., for what spans more than a factor of 20."""
    low, high = axes.dataLim.intervaly
    if not 0 < low * _WIDE < high:
        return
    ticker = _matplotlib().ticker
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


_WIDE = 20


def as_png(figure: Figure) -> bytes:
    """The picture's file: the same bytes for the same picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
