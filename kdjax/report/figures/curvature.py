"""Figures of the loss around the final weights: eigenvalue densities of the Hessian, and planes through the weights."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.report import text
from kdjax.report.comparisons import Result
from kdjax.report.figures import style
from kdjax.report.figures.style import Axes, Panel

_LEVELS = 9  # most contour lines of a surface


def panels(result: Result) -> list[Panel]:
    """Densities, a few arms to a figure, then all surfaces in one figure."""
    found = [density_panel(result, arms) for arms in style.groups(list(result.get("densities", {})))]
    return found + ([surface_panel(result)] if result.get("surfaces") else [])


def density_panel(result: Result, arms: Sequence[str]) -> Panel:
    """Density of the Hessian's eigenvalues on a logarithmic axis: mean as a line, lowest to highest as a band."""
    from matplotlib.ticker import LogLocator, NullLocator

    colours = style.colours_of(result)
    densities = {arm: result["densities"][arm] for arm in arms}
    found = {
        arm: (np.asarray(d["grid"], float), np.asarray(d["density"], float)) for arm, d in densities.items()
    }
    # A logarithmic axis has no zero, and below this the density is rounding error.
    floor = 1e-6 * max(float(runs.max()) for _, runs in found.values())
    labels = {arm: style.short(arm) for arm in arms}

    def draw(ax: Axes) -> None:
        ax.set_yscale("log")
        for arm, (grid, runs) in found.items():
            runs = np.maximum(runs, floor)
            if len(runs) > 1:
                ax.fill_between(grid, runs.min(0), runs.max(0), color=colours[arm], alpha=0.18, linewidth=0)
            ax.plot(grid, runs.mean(0), color=colours[arm], lw=1.5)
        ax.axvline(0, color=style.MUTED, lw=0.8, dashes=(4, 3))
        ax.set_ylim(bottom=floor)
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_major_formatter(lambda value, _: _power(value))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="y", which="both", length=0)
        style.value_axis(ax, "eigenvalue of the Hessian", "density")
        style.legend_below(ax, result, labels)

    several = any(len(runs) > 1 for _, runs in found.values())
    caption = (
        "Density of the Hessian's eigenvalues. Large ones are directions in which the loss is sharp, negative ones "
        "directions in which it curves down. "
    )
    caption += "Line: mean; band: lowest to highest run or probe." if several else "One run."
    ends = [
        f"{arm} up to {grid[runs.max(0) > 1e-6 * runs.max()].max():.3g}"
        for arm, (grid, runs) in found.items()
    ]
    alt = f"Densities of the Hessian's eigenvalues: {text.listing(ends)}."
    return Panel(draw, caption, alt, 2.7 + style.legend_height(labels))


def _power(value: float) -> str:
    """A power of ten, such as 10⁻³."""
    exponent = str(round(math.log10(value)))
    return "1" if exponent == "0" else "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def surface_panel(result: Result) -> Panel:
    """The loss over a plane through the final weights, one square per arm, with the same levels and colours in all."""
    surfaces = {
        arm: [np.asarray(surface[name], float) for name in ("x", "y", "loss")]
        for arm, surface in result["surfaces"].items()
    }
    losses = np.concatenate([loss.ravel() for _, _, loss in surfaces.values()])
    levels = _levels(float(losses.min()), float(losses.max()))
    steps = np.concatenate([step for x, y, _ in surfaces.values() for step in (x, y)])
    first, last = float(steps.min()), float(steps.max())
    centre = {
        arm: text.number(float(loss[x == 0, y == 0].item()), None) for arm, (x, y, loss) in surfaces.items()
    }
    # Data are inches, from the upper left corner of the figure.
    columns = 3 if len(surfaces) == 3 or len(surfaces) > 4 else 2
    width, gap = 4.0, 0.14
    side = (width - gap * (columns - 1)) / columns
    pitch = side + 0.52
    bottom = math.ceil(len(surfaces) / columns) * pitch

    def draw(ax: Axes) -> None:
        for i, (arm, surface) in enumerate(surfaces.items()):
            left, top = i % columns * (side + gap), i // columns * pitch + 0.24
            _draw_square(ax, surface, levels, (left, top, side), (first, last))
            ax.text(left, top - 0.05, style.short(arm, 16 if columns == 3 else 24), va="bottom", fontsize=9)
            ax.text(left, top + side + 0.05, f"dot: {centre[arm]}", va="top", fontsize=8, color=style.MUTED)
        _draw_scale(ax, levels, bottom, width)
        ax.set(xlim=(-0.02, width + 0.02), ylim=(bottom + 0.58, 0), aspect="equal", anchor="NW")
        ax.axis("off")

    caption = (
        "The loss on a plane through the final weights of each arm's first run, along two random filter-normalised "
        "directions. Dot: the final weights, with their loss below the square. At an edge every unit's weights have "
        f"moved by {100 * max(-first, last):g} % of their norm. Colours and lines mean the same in every square; "
        "stronger is higher. A plane shows two of many dimensions: the loss may fall along others."
    )
    ends = [
        f"{arm} {centre[arm]} there and up to {text.number(float(loss.max()), None)}"
        for arm, (_, _, loss) in surfaces.items()
    ]
    alt = f"Contours of the loss over a plane through the final weights: {text.listing(ends)}."
    return Panel(draw, caption, alt, bottom + 0.65)


def _draw_square(
    ax: Axes,
    surface: Sequence[np.ndarray],
    levels: Sequence[float],
    place: tuple[float, float, float],
    limits: tuple[float, float],
) -> None:
    """Draws one surface (x, y, loss) into the square at ``place`` = (left, top, side)."""
    from matplotlib.patches import Rectangle

    (x, y, loss), (left, top, side), (first, last) = surface, place, limits
    scale = side / (last - first)
    across, down = left + scale * (x - first), top + scale * (last - y)
    edges = [-1e101, *levels, 1e101]  # beyond any number of a result
    ax.contourf(across, down, loss.T, levels=edges, colors=_shades(levels))
    crossed = [level for level in levels if loss.min() < level < loss.max()]
    if crossed:
        ax.contour(across, down, loss.T, levels=crossed, colors=style.INK, linewidths=0.5)
    ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=style.MUTED, lw=0.6))
    ax.plot(left - scale * first, top + scale * last, "o", color=style.INK, markersize=3.5)


def _draw_scale(ax: Axes, levels: Sequence[float], bottom: float, width: float) -> None:
    """Draws the colours between the levels as a scale under the squares."""
    from matplotlib.patches import Rectangle

    step = width / (len(levels) + 1)
    ax.text(0, bottom + 0.18, "loss", va="bottom", fontsize=9)
    for i, shade in enumerate(_shades(levels)):
        ax.add_patch(Rectangle((i * step, bottom + 0.22), step, 0.16, facecolor=shade, linewidth=0))
    for i, level in enumerate(levels, 1):
        ax.plot((i * step, i * step), (bottom + 0.22, bottom + 0.38), color=style.INK, lw=0.5)
        look = {"ha": "center", "va": "top", "fontsize": 8, "color": style.MUTED}
        ax.text(i * step, bottom + 0.42, f"{level:g}", **look)


def _levels(low: float, high: float) -> list[float]:
    """Round numbers between two losses: in equal steps, or in equal factors if the losses span more than a decade."""
    from matplotlib.ticker import MaxNLocator

    least = max(low, 1e-6 * high)  # no factor leads from zero to another loss
    levels = [float(level) for level in MaxNLocator(_LEVELS - 1).tick_values(low, high)]
    if low >= 0 and high > 10 * least:
        decades = range(math.floor(math.log10(least)), math.ceil(math.log10(high)))
        for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            levels = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
            levels = [level for level in levels if least < level < high]
            if len(levels) <= _LEVELS:
                break
    return [level for level in levels if low < level < high] or [high]


def _shades(levels: Sequence[float]) -> list[Any]:
    """A colour below, between and above the levels, light enough for the lines drawn over it."""
    from matplotlib.colors import to_rgba

    return [to_rgba(style.BLUE, alpha) for alpha in np.linspace(0.04, 0.7, len(levels) + 1)]
