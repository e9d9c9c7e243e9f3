"""Figures as :class:`Panel` values, drawn on any matplotlib axes.

A panel stands alone as an SVG inside a page, whose colours follow the reader's light or dark theme, or beside another
in an image file. A new kind of figure is a new function that returns a Panel, and a line in :func:`panels`.
"""

import io
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from kdjax import files, significance
from kdjax.report import words
from kdjax.report.words import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in an image; in a page each stands for the CSS variable of its name.
LIGHT = {
    "paper": "#fdfdfb",
    "ink": "#1d1d20",
    "muted": "#66666e",
    "grid": "#dfdfe1",
    "s0": "#b04a16",
    "s1": "#1f63ad",
    "s2": "#1d7a53",
    "s3": "#7a4aa6",
    "s4": "#8a6500",
    "s5": "#a8326b",
    "s6": "#0f7680",
}
SERIES = tuple(f"s{i}" for i in range(7))


class Panel(NamedTuple):
    """One figure: how to draw it on axes, what stands under it, what it shows in words, its height in inches."""

    draw: Callable[["Axes"], None]
    caption: str
    alt: str
    height: float


def panels(result: Result) -> list[Panel]:
    """The figures of a result: its ratios, its arms on the first metric, its training curves."""
    found = [ratio_panel(result)] if result.get("ratios") else []
    primary = words.primary_of(result)
    if primary is not None:
        found.append(dot_panel(result, metric=primary))
    names = dict.fromkeys(m for curves in result.get("curves", {}).values() for m in curves)
    # Curves of the metric in question come first.
    ordered = sorted(names, key=lambda name: primary is None or primary not in name)
    return found + [curve_panel(result, metric=name) for name in ordered]


def dot_panel(result: Result, *, metric: str) -> Panel:
    """Every seed of every arm as a dot, with the mean and its 95 % t-interval."""
    from matplotlib.ticker import LogLocator

    arms = [arm for arm, metrics in result["arms"].items() if metric in metrics]
    kind, colours = words.metric_of(metric), colours_of(result)
    values = [kind.scale * np.asarray(result["arms"][arm][metric], np.float64) for arm in arms]
    flat = np.concatenate(values)

    def draw(ax: "Axes") -> None:
        for y, (arm, runs) in enumerate(zip(arms, values, strict=True)):
            colour, mean = LIGHT[colours[arm]], float(runs.mean())
            if len(runs) > 1:
                below = y + 0.27 + np.linspace(-0.08, 0.08, len(runs))
                ax.scatter(runs, below, s=22, color=colour, alpha=0.5, linewidths=0)
                ax.plot(_interval(runs), (y, y), color=colour, lw=2)
            ax.plot(mean, y, "o", color=colour, markersize=6)
            _beside(ax, y, words.mean_text(result, arm, metric), colour)
        if kind.unit != "%" and flat.min() > 0 and flat.max() > 10 * flat.min():
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(arms)), [_short(arm) for arm in arms])
        ax.set_ylim(len(arms) - 0.45, -0.45)
        ax.set_title(words.axis_title(kind))
        ax.grid(axis="x")

    unit = "repeat" if result.get("ratios") else "seed"
    caption = f"Each dot is the only {unit} that was run."
    if any(len(runs) > 1 for runs in values):
        caption = f"Small dots: one {unit} each. Large dot and line: mean and its 95 % interval."
    means = words.listing([f"{arm} {words.mean_text(result, arm, metric)}" for arm in arms])
    return Panel(draw, caption, f"Dot plot of {kind.title} by arm, means: {means}.", 0.7 + 0.46 * len(arms))


def curve_panel(result: Result, *, metric: str) -> Panel:
    """A metric over the epochs: mean over seeds as a line, lowest to highest seed as a band."""
    from matplotlib.ticker import MaxNLocator

    kind, colours = words.metric_of(metric), colours_of(result)
    curves = {arm: _stack(c[metric]) for arm, c in result["curves"].items() if metric in c}
    curves = {arm: (epochs, kind.scale * runs) for arm, (epochs, runs) in curves.items() if epochs.size}

    def draw(ax: "Axes") -> None:
        for arm, (epochs, runs) in curves.items():
            colour = LIGHT[colours[arm]]
            if len(runs) > 1:
                ax.fill_between(epochs, runs.min(0), runs.max(0), color=colour, alpha=0.18, linewidth=0)
            marker = "o" if epochs.size == 1 else None
            ax.plot(epochs, runs.mean(0), color=colour, lw=1.8, marker=marker, markersize=4)
        if curves:
            _limit(ax, curves)
            heights = _spread(ax, [float(runs[:, -1].mean()) for _, runs in curves.values()])
            for arm, y in zip(curves, heights, strict=True):
                _beside(ax, y, _short(arm), LIGHT[colours[arm]], rows="axes fraction")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"])
        ax.set_xlabel("epoch")
        ax.set_title(words.axis_title(kind))
        ax.grid(axis="y")

    several = any(len(runs) > 1 for _, runs in curves.values())
    caption = f"{words.capital(kind.title)} over training. " + (
        "Line: mean over seeds; band: lowest to highest seed." if several else "One seed."
    )
    last = {arm: words.number(float(runs[:, -1].mean()), kind.decimals) for arm, (_, runs) in curves.items()}
    ends = words.listing(
        [f"{arm} {text} {kind.unit}".rstrip() for arm, text in last.items()] or ["no values"]
    )
    alt = f"Curves of {kind.title} by epoch, at the end: {ends}."
    return Panel(draw, caption, alt, 2.7)


def ratio_panel(result: Result) -> Panel:
    """How many times kdjax is ahead of each peer, on a logarithmic axis with a line at one."""
    ratios = result["ratios"]
    low = min(1.0, *(r["low"] for r in ratios.values()))
    high = max(1.0, *(r["high"] for r in ratios.values()))

    def draw(ax: "Axes") -> None:
        ax.set_xscale("log")
        for y, r in enumerate(ratios.values()):
            colour = LIGHT["s2" if r["low"] > 1 else "s0" if r["high"] < 1 else "muted"]
            ax.plot((1, r["median"]), (y, y), color=colour, lw=1, alpha=0.5)
            ax.plot((r["low"], r["high"]), (y, y), color=colour, lw=4, alpha=0.45, solid_capstyle="butt")
            ax.plot(r["median"], y, "o", color=colour, markersize=7)
            _beside(ax, y, words.times(r["median"]), colour)
        ax.axvline(1, color=LIGHT["ink"], lw=1)
        margin = (high / low) ** 0.07
        ax.set_xlim(low / margin, high * margin)
        ticks = _ratio_ticks(low, high)
        ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(ratios)), [_short(peer) for peer in ratios])
        ax.set_ylim(len(ratios) - 0.5, -0.5)
        ax.set_title("times faster or smaller than the peer")
        ax.grid(axis="x")

    caption = "Median, and from low to high, on a logarithmic axis. Right of the line at 1× kdjax is ahead."
    medians = words.listing([f"{peer} {words.times(r['median'])}" for peer, r in ratios.items()])
    return Panel(draw, caption, f"Ratios of kdjax to its peers: {medians}.", 0.85 + 0.4 * len(ratios))


def save_figure(path: str | os.PathLike[str], result: Result) -> None:
    """Writes the result's main figure as an image: its first two panels side by side.

    Args:
      path: of the image; the suffix decides the format (``.png``, ``.svg``, ``.pdf``).
      result: as read by :func:`kdjax.results.read`.

    Raises:
      ValueError: if the result has nothing to draw, or the suffix is no image format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = panels(result)[:2]
    if not shown:
        raise ValueError(f"{result['name']} holds no arms, ratios or curves to draw.")
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(4.6 * len(shown), max(p.height for p in shown)), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False, gridspec_kw={"wspace": 0.12})
        for ax, panel in zip(axes[0], shown, strict=True):
            panel.draw(ax)
        sides = ("Left: ", "Right: ") if shown[1:] else ("",)
        captions = [side + panel.caption for side, panel in zip(sides, shown, strict=True)]
        lines = [line for caption in captions for line in textwrap.wrap(caption, 70 * len(shown))]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small", color=LIGHT["muted"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or None, dpi=180)
    files.write_bytes(path, buffer.getvalue())


def svg(panel: Panel, *, key: str) -> str:
    """One panel as an inline ``<svg>`` that takes colours and font from the page around it.

    Args:
      panel: what to draw.
      key: differs between the figures of a page, so that their internal names do not clash.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style({"svg.fonttype": "none", "svg.hashsalt": key})):
        figure = Figure(figsize=(4.2, panel.height), layout="constrained")
        panel.draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), panel.alt)


def _inline(drawn: bytes, alt: str) -> str:
    """Turns matplotlib's SVG file into an element: no prolog, no namespaces, colours as CSS variables."""
    variables = {value: f"var(--{name})" for name, value in LIGHT.items()}
    root = ElementTree.fromstring(drawn)
    for parent in root.iter():
        for child in list(parent):
            # The style sheet inside would apply to the whole page; the metadata name a site.
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        attributes = {k.split("}")[-1]: v for k, v in element.attrib.items()}
        if element.tag == "g":
            attributes.pop("id", None)
        if "style" in attributes:
            colour = re.compile("#[0-9a-f]{6}")
            attributes["style"] = colour.sub(lambda m: variables.get(m[0], m[0]), attributes["style"])
        element.attrib = attributes
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode", method="html")


def _style(more: Mapping[Any, Any] = {}) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.parse_math": False,
        "text.color": LIGHT["ink"],
        "figure.facecolor": LIGHT["paper"],
        "axes.facecolor": "none",
        "axes.edgecolor": LIGHT["muted"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.labelpad": 6,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.titlepad": 8,
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT["muted"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["ink"],
        "ytick.left": False,
        "xtick.major.size": 3,
        **more,
    }


def colours_of(result: Result) -> dict[str, str]:
    """One colour name per arm, the same in every figure and table of a page."""
    arms = list(dict.fromkeys([*result["arms"], *result.get("curves", {})]))
    competing = [arm for arm in arms if arm not in words.REFERENCES]
    colours = {arm: SERIES[i % len(SERIES)] for i, arm in enumerate(competing)}
    return colours | {arm: "muted" for arm in arms if arm in words.REFERENCES}


def _stack(runs: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Epoch numbers and runs [seed, epoch], at the epochs where every seed has a value."""
    length = min(map(len, runs))
    values = np.asarray([list(run)[:length] for run in runs], np.float64)
    kept = np.isfinite(values).all(0)
    return 1 + np.flatnonzero(kept), values[:, kept]


def _limit(ax: "Axes", curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Leaves the first fifth of a long training out of the vertical range, where curves fall or rise from afar."""
    late = [r[:, r.shape[1] // 5 if r.shape[1] >= 10 else 0 :] for _, r in curves.values()]
    low, high = min(float(r.min()) for r in late), max(float(r.max()) for r in late)
    margin = 0.06 * (high - low) or 0.01
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlim(1, max(2, *(int(epochs[-1]) for epochs, _ in curves.values())))


def _spread(ax: "Axes", values: Sequence[float], gap: float = 0.085) -> list[float]:
    """Heights in the axes for labels at these values, pushed apart so that no two overlap."""
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


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, finer where the range is short; 1 is always among them."""
    fine, medium, coarse = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 8, 9), (1, 2, 5), (1,)
    steps = coarse if high / low > 300 else medium if high / low > 4 else fine
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = {step * 10.0**power for power in powers for step in steps}
    return sorted({t for t in ticks if low * 0.97 <= t <= high * 1.03} | {1.0})


def _beside(ax: "Axes", y: float, text: str, colour: str, *, rows: str = "data") -> None:
    """Writes to the right of the axes, at a height in data or in axes coordinates."""
    ax.annotate(text, (1.03, y), xycoords=("axes fraction", rows), va="center", color=colour)


def _short(text: str, width: int = 24) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t-interval of the mean of at least two values."""
    from scipy import stats

    mean, sd, n = significance.summarise(values.tolist())
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half
