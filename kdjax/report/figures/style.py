"""What all figures share: the :class:`Panel`, colours and markers, ticks, labels that do not overlap, and SVG."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kdjax import significance
from kdjax.extras import extra
from kdjax.report.comparisons import Result, is_reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any  # matplotlib is an extra

PAPER, INK, MUTED, GRID = "#fdfdfb", "#1d1d20", "#66666e", "#dfdfe1"
ORANGE, BLUE, GREEN = "#b04a16", "#1f63ad", "#1d7a53"
SERIES = (ORANGE, BLUE, GREEN, "#7a4aa6", "#8a6500", "#a8326b", "#0f7680")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # tell arms of one colour apart

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.labelpad": 6,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titlepad": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    # For SVG: text stays text, the same figure gives the same bytes, and small images are not scaled up.
    "svg.fonttype": "none",
    "svg.hashsalt": "kdjax",
    "image.composite_image": False,
}


class Table(NamedTuple):
    """The numbers behind a figure: a title, column headings, and rows whose first cell names them."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Panel(NamedTuple):
    """One figure: a function that draws it on axes, its caption, a text alternative, and its height in inches."""

    draw: Callable[[Axes], None]
    caption: str
    alt: str
    height: float
    table: Table | None = None


def svg(panel: Panel) -> bytes:
    """Draws one panel, 4.2 inches wide, as an SVG file."""
    with extra("report"):
        import matplotlib
        from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, panel.height), layout="constrained")
        panel.draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def colours_of(result: Result) -> dict[str, str]:
    """One colour per arm, the same in every figure and table of a result; references are grey."""
    return {arm: SERIES[i % len(SERIES)] if i >= 0 else MUTED for arm, i in _numbered(result).items()}


def markers_of(result: Result) -> dict[str, str]:
    """One marker per arm; a second one begins when the colours are used up."""
    numbered = _numbered(result).items()
    return {arm: MARKERS[i // len(SERIES) % len(MARKERS)] if i >= 0 else "o" for arm, i in numbered}


def _numbered(result: Result) -> dict[str, int]:
    """The arms and the lines of sweeps, which may have names of their own, with their number; references have -1."""
    swept = [line for sweep in result.get("swept", []) for line in sweep["arms"]]
    lines = dict.fromkeys([*result["arms"], *result.get("curves", {}), *swept], -1)
    return lines | {arm: i for i, arm in enumerate(arm for arm in lines if not is_reference(arm))}


def legend_below(ax: Axes, result: Result, labels: Mapping[str, str]) -> None:
    """Puts a legend of the arms under the figure; ``labels`` are arm → text."""
    from matplotlib.lines import Line2D

    colours, markers = colours_of(result), markers_of(result)
    handles = [
        Line2D([], [], color=colours[arm], marker=markers[arm], linestyle="", markersize=6, label=label)
        for arm, label in labels.items()
    ]
    root: Any = ax.figure
    spacing = {"handletextpad": 0.2, "columnspacing": 1.2, "borderpad": 0.2}
    columns = _columns(labels)
    root.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=9, **spacing
    )


def legend_height(labels: Mapping[str, str]) -> float:
    """Inches that :func:`legend_below` needs."""
    return 0.12 + 0.17 * math.ceil(len(labels) / _columns(labels))


def _columns(labels: Mapping[str, str]) -> int:
    return max(1, min(len(labels), 54 // (4 + max(map(len, labels.values())))))


def groups(arms: Sequence[str], size: int = 4) -> list[list[str]]:
    """Splits the arms into groups of about equal size, at most ``size`` each."""
    count = math.ceil(len(arms) / size)
    return [list(part) for part in np.array_split(np.asarray(arms, object), count)] if count else []


def is_wide(values: Sequence[float]) -> bool:
    """Whether values need a logarithmic axis: all positive, and the largest over 30 times the smallest."""
    return min(values) > 0 and max(values) > 30 * min(values)


def value_ticks(ax: Axes, values: np.ndarray, *, log: bool, label: str = "{:g}") -> None:
    """Ticks the x axis at the rising values themselves if these are few and far apart, else at round numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if log:
        ax.set_xscale("log")
    scale = np.log10(values) if log else values
    span = float(np.ptp(scale)) or 1.0
    if len(values) <= 8 and (len(values) == 1 or float(np.diff(scale).min()) > 0.1 * span):
        ax.set_xticks(values.tolist(), [label.format(value) for value in values])
    else:
        subs = (1,) if is_wide(values.tolist()) else (1, 2, 5)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9) if log else MaxNLocator(nbins=6))
        ax.xaxis.set_major_formatter(lambda value, _: label.format(value))
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = float(scale.min()) - 0.06 * span, float(scale.max()) + 0.06 * span
    ax.set_xlim((10**low, 10**high) if log else (low, high))


def shifted(values: np.ndarray, part: float, *, log: bool) -> np.ndarray:
    """Moves values along the x axis by a part of their range, so that marks do not hide each other."""
    scale = np.log10(values) if log else values
    moved = scale + part * (float(np.ptp(scale)) or 1.0)
    return 10**moved if log else moved


def value_axis(ax: Axes, across: str, title: str) -> None:
    """Names the x axis and, above it, the y axis, and draws the grid of the latter."""
    ax.set_xlabel(across)
    ax.tick_params(axis="y", labelcolor=MUTED)
    ax.set_title(title)
    ax.grid(axis="y")


def label_ends(ax: Axes, arms: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Writes each arm's name to the right of the axes at the height of its value, without overlaps."""
    for arm, y in zip(arms, _spread(ax, list(arms.values())), strict=True):
        beside(ax, y, short(arm, 16), colours[arm], rows="axes fraction")


def _spread(ax: Axes, values: Sequence[float], gap: float = 0.085) -> list[float]:
    """Heights of labels at these values, as fractions of the axes, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    wanted = (np.asarray(values) - low) / (high - low)
    gap = min(gap, 0.98 / max(1, len(values) - 1))
    order = np.argsort(wanted)
    placed = wanted[order].copy()
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed += float(np.mean(wanted[order] - placed))
    placed -= max(0.0, placed[-1] - 0.99)
    placed += max(0.0, 0.01 - placed[0])
    heights = np.empty_like(placed)
    heights[order] = placed
    return heights.tolist()


def beside(ax: Axes, y: float, label: str, colour: str, *, rows: str = "data") -> None:
    """Writes a label to the right of the axes; ``rows`` are the units of y, as in matplotlib's ``xycoords``."""
    ax.annotate(label, (1.03, y), xycoords=("axes fraction", rows), va="center", color=colour)


def short(name: str, width: int = 24) -> str:
    """Cuts a long name in the middle: names that begin alike often end differently."""
    tail = width // 2 - 1
    return name if len(name) <= width else f"{name[: width - tail - 1]}…{name[-tail:]}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t-interval of the mean of at least two values."""
    with extra("report"):
        from scipy import stats

    mean, sd, n = significance.summarise(values.tolist())
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half
