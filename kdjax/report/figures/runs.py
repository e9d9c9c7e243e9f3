"""Figures of runs: every seed of every arm, training curves, ratios to other libraries."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from kdjax.report import comparisons, text
from kdjax.report.comparisons import Result
from kdjax.report.figures import style
from kdjax.report.figures.style import Axes, Panel


def arm_panels(result: Result) -> list[Panel]:
    """The ratios of a benchmark, and the arms by the metric in question."""
    found = [ratio_panel(result)] if result.get("ratios") else []
    primary = comparisons.primary_of(result)
    return found if primary is None else [*found, dot_panel(result, metric=primary)]


def curve_panels(result: Result) -> list[Panel]:
    """One figure per metric that has curves; the metric in question comes first."""
    primary = comparisons.primary_of(result)
    names = dict.fromkeys(m for curves in result.get("curves", {}).values() for m in curves)
    ordered = sorted(names, key=lambda name: primary is None or primary not in name)
    return [curve_panel(result, metric=name) for name in ordered]


def dot_panel(result: Result, *, metric: str) -> Panel:
    """Every seed of every arm as a dot, with the mean and its 95 % t-interval."""
    from matplotlib.ticker import LogLocator

    arms = [arm for arm, metrics in result["arms"].items() if metric in metrics]
    kind, colours = text.metric_of(metric), style.colours_of(result)
    values = [kind.scale * np.asarray(result["arms"][arm][metric], np.float64) for arm in arms]
    flat = np.concatenate(values)

    def draw(ax: Axes) -> None:
        for y, (arm, runs) in enumerate(zip(arms, values, strict=True)):
            colour, mean = colours[arm], float(runs.mean())
            if len(runs) > 1:
                below = y + 0.27 + np.linspace(-0.08, 0.08, len(runs))
                ax.scatter(runs, below, s=22, color=colour, alpha=0.5, linewidths=0)
                ax.plot(style.interval(runs), (y, y), color=colour, lw=2)
            ax.plot(mean, y, "o", color=colour, markersize=6)
            style.beside(ax, y, text.mean_text(result, arm, metric), colour)
        if kind.unit != "%" and flat.min() > 0 and flat.max() > 10 * flat.min():
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if flat.max() < 50 * flat.min() else (1,)))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(arms)), [textwrap.fill(arm, 24) for arm in arms])
        ax.set_ylim(len(arms) - 0.45, -0.45)
        ax.set_title(text.axis_title(kind))
        ax.grid(axis="x")

    unit = "repeat" if result.get("ratios") else "seed"
    caption = f"Each dot is the only {unit} that was run."
    if any(len(runs) > 1 for runs in values):
        caption = f"Small dots: one {unit} each. Large dot and line: mean and its 95 % interval."
    means = text.listing([f"{arm} {text.mean_text(result, arm, metric)}" for arm in arms])
    return Panel(draw, caption, f"Dot plot of {kind.title} by arm, means: {means}.", 0.7 + 0.46 * len(arms))


def curve_panel(result: Result, *, metric: str) -> Panel:
    """A metric over the epochs: mean over seeds as a line, lowest to highest seed as a band."""
    from matplotlib.ticker import MaxNLocator

    kind, colours = text.metric_of(metric), style.colours_of(result)
    curves = {arm: _stack(c[metric]) for arm, c in result["curves"].items() if metric in c}
    curves = {arm: (epochs, kind.scale * runs) for arm, (epochs, runs) in curves.items() if epochs.size}
    ends = {arm: float(runs[:, -1].mean()) for arm, (_, runs) in curves.items()}

    def draw(ax: Axes) -> None:
        for arm, (epochs, runs) in curves.items():
            if len(runs) > 1:
                ax.fill_between(epochs, runs.min(0), runs.max(0), color=colours[arm], alpha=0.18, linewidth=0)
            marker = "o" if epochs.size == 1 else None
            ax.plot(epochs, runs.mean(0), color=colours[arm], lw=1.8, marker=marker, markersize=4)
        if curves:
            _limit(ax, curves)
            style.label_ends(ax, ends, colours)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        style.value_axis(ax, "epoch", text.axis_title(kind))

    several = any(len(runs) > 1 for _, runs in curves.values())
    caption = f"{text.capital(kind.title)} over training. " + (
        "Line: mean over seeds; band: lowest to highest seed." if several else "One seed."
    )
    printed = [f"{arm} {text.with_unit(end, kind)}" for arm, end in ends.items()]
    alt = f"Curves of {kind.title} by epoch, at the end: {text.listing(printed or ['no values'])}."
    return Panel(draw, caption, alt, 2.7)


def ratio_panel(result: Result) -> Panel:
    """How many times kdjax is ahead of each peer, on a logarithmic axis with a line at one."""
    ratios = result["ratios"]
    low = min(1.0, *(r["low"] for r in ratios.values()))
    high = max(1.0, *(r["high"] for r in ratios.values()))

    def draw(ax: Axes) -> None:
        ax.set_xscale("log")
        for y, r in enumerate(ratios.values()):
            colour = style.GREEN if r["low"] > 1 else style.ORANGE if r["high"] < 1 else style.MUTED
            ax.plot((1, r["median"]), (y, y), color=colour, lw=1, alpha=0.5)
            ax.plot((r["low"], r["high"]), (y, y), color=colour, lw=4, alpha=0.45, solid_capstyle="butt")
            ax.plot(r["median"], y, "o", color=colour, markersize=7)
            style.beside(ax, y, text.times(r["median"]), colour)
        ax.axvline(1, color=style.INK, lw=1)
        margin = (high / low) ** 0.07
        ax.set_xlim(low / margin, high * margin)
        ticks = _ratio_ticks(low, high)
        ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(ratios)), [textwrap.fill(peer, 24) for peer in ratios])
        ax.set_ylim(len(ratios) - 0.5, -0.5)
        ax.set_title("times faster or smaller")
        ax.grid(axis="x")

    caption = (
        "Dot: the median ratio to each peer; bar: lowest to highest, on a logarithmic axis. Right of the line at 1× "
        "kdjax is ahead."
    )
    medians = text.listing([f"{peer} {text.times(r['median'])}" for peer, r in ratios.items()])
    return Panel(draw, caption, f"Ratios of kdjax to its peers: {medians}.", 0.85 + 0.4 * len(ratios))


def _stack(runs: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Epoch numbers and runs [seed, epoch], at the epochs where every seed has a value."""
    length = min(map(len, runs))
    values = np.asarray([list(run)[:length] for run in runs], np.float64)
    kept = np.isfinite(values).all(0)
    return 1 + np.flatnonzero(kept), values[:, kept]


def _limit(ax: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Fits the vertical range to the last four fifths of a long training: its start would flatten the rest."""
    late = [r[:, r.shape[1] // 5 if r.shape[1] >= 10 else 0 :] for _, r in curves.values()]
    low, high = min(float(r.min()) for r in late), max(float(r.max()) for r in late)
    margin = 0.06 * (high - low) or 0.01
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlim(1, max(2, *(int(epochs[-1]) for epochs, _ in curves.values())))


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, finer where the range is short; 1 is always among them."""
    fine, medium, coarse = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 8, 9), (1, 2, 5), (1,)
    steps = coarse if high / low > 300 else medium if high / low > 4 else fine
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = {step * 10.0**power for power in powers for step in steps}
    kept = [1.0]
    for tick in sorted((t for t in ticks if low * 0.97 <= t <= high * 1.03), key=lambda t: abs(math.log(t))):
        if all(abs(math.log(tick / other)) > 0.24 * math.log(high / low) for other in kept):
            kept.append(tick)
    return sorted(kept)
