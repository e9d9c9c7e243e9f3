"""Figures of trained networks: what disturbs them, how far to trust them, what they confuse, cost and look at."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax.report import text
from kdjax.report.style import (
    LIGHT,
    Folded,
    Panel,
    beside,
    colours_of,
    groups,
    height_below,
    interval,
    is_wide,
    markers_of,
    named_below,
    percent,
    short,
    spread,
)
from kdjax.report.text import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MATRICES = 3  # arms that get a confusion matrix
_NUMBERED = 12  # classes up to which its cells hold numbers
_OVERLAYS = 12  # images drawn
_LEVELS = 9  # most contour lines of a surface

# How the disturbances are called, what their size is, and in which order they stand; corruptions come second.
_DISTURBANCES = {
    "clean": ("clean", "", 0),
    "mean_corruption": ("all corruptions", "", 2),
    "weight_noise": ("noise on the weights", "deviation", 3),
    "fgsm": ("FGSM attack", "grey levels", 4),
    "pgd": ("PGD attack", "grey levels", 5),
}


def panels(result: Result) -> list[Panel]:
    """All figures of this module but densities and surfaces, for the fields that the result holds."""
    found = [compression_panel(result)] if result.get("costs") and _scored(result) else []
    found += [robustness_panel(result)] if _disturbances(result) else []
    found += [reliability_panel(result, arms) for arms in groups(list(result.get("calibration", {})))]
    found += [confusion_panel(result, arm) for arm in list(result.get("confusion", {}))[:_MATRICES]]
    return found + ([overlay_panel(result)] if result.get("overlays") else [])


def robustness_panel(result: Result) -> Panel:
    """One row per kind of disturbance, one mark per arm with its 95 % interval over the seeds."""
    kinds, colours, markers = _disturbances(result), colours_of(result), markers_of(result)
    arms = [arm for arm in result["robustness"] if any(arm in sizes for sizes in kinds.values())]
    means = {
        kind: {arm: 100 * np.mean(list(by_size.values()), axis=0) for arm, by_size in found.items()}
        for kind, found in kinds.items()
    }
    labels = {arm: short(arm) for arm in arms}
    # The marks of a row stand under each other, in the order of the arms.
    step = min(0.2, 0.72 / max(1, len(arms) - 1))

    def draw(ax: "Axes") -> None:
        for row, found in enumerate(means.values()):
            if row:
                ax.axhline(row - 0.5, color=LIGHT["grid"], lw=0.8, zorder=0)
            for i, arm in enumerate(arms):
                if arm not in found:
                    continue
                colour, y = LIGHT[colours[arm]], row + step * (i - (len(arms) - 1) / 2)
                if len(found[arm]) > 1:
                    low, high = interval(found[arm])
                    ax.plot((max(low, 0), min(high, 100)), (y, y), color=colour, lw=1.6, alpha=0.6)
                ax.plot(float(found[arm].mean()), y, markers[arm], color=colour, markersize=5)
        ax.set_yticks(range(len(means)), [_disturbance(kind)[0] for kind in means])
        ax.set_ylim(len(means) - 0.5, -0.5)
        ax.set_title("accuracy, %")
        ax.grid(axis="x")
        named_below(ax, result, labels)

    several = any(len(runs) > 1 for found in means.values() for runs in found.values())
    caption = "Test accuracy on clean images and under each disturbance, averaged over its strengths. "
    caption += "Mark: mean over seeds; line: its 95 % interval." if several else "One seed."
    alt = "; ".join(
        f"{_disturbance(kind)[0]}: "
        + text.listing([f"{arm} {percent(float(runs.mean()) / 100)} %" for arm, runs in found.items()])
        for kind, found in means.items()
    )
    height = 0.75 + len(means) * max(0.3, 0.13 + 0.095 * len(arms)) + height_below(list(labels.values()))
    return Panel(draw, caption, f"Accuracy by disturbance. {alt}.", height, _robustness_table(kinds))


def _robustness_table(kinds: Mapping[str, Any]) -> Folded:
    """Per disturbance a block: arms by strengths."""
    blocks = []
    for kind, found in kinds.items():
        title, unit, _ = _disturbance(kind)
        sizes = sorted({size for by_size in found.values() for size in by_size})
        head = [f"{title}, {unit}" if unit else title, *(f"{s:g}" if unit else "" for s in sizes)]
        rows = [
            [arm, *(_mean_sd(by_size[size]) if size in by_size else "–" for size in sizes)]
            for arm, by_size in found.items()
        ]
        blocks.append((head, rows))
    return Folded("Accuracy at every strength, %", blocks)


def _disturbances(result: Result) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Accuracies as kind → arm → size → one per seed, in the order of the figure."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for arm, disturbances in result.get("robustness", {}).items():
        for name, values in disturbances.items():
            kind, *rest = name.split("/")
            if len(rest) < 2:  # else it is another metric than accuracy
                found.setdefault(kind, {}).setdefault(arm, {})[float(rest[0]) if rest else 0.0] = values
    return dict(sorted(found.items(), key=lambda item: _disturbance(item[0])[2]))


def _disturbance(kind: str) -> tuple[str, str, int]:
    """Title, unit of the size, and place of a disturbance."""
    return _DISTURBANCES.get(kind, (kind.replace("_", " "), "severity", 1))


def _mean_sd(values: Sequence[float]) -> str:
    sd = f" ± {percent(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return percent(float(np.mean(values))) + sd


def reliability_panel(result: Result, arms: Sequence[str]) -> Panel:
    """Accuracy against confidence, bin by bin, with the diagonal on which a network is as good as it thinks."""
    colours, markers = colours_of(result), markers_of(result)
    bins = {arm: _filled_bins(result["calibration"][arm]) for arm in arms}
    errors = {arm: _calibration_error(*found) for arm, found in bins.items()}
    labels = {arm: f"{short(arm)}, off by {percent(error)} %" for arm, error in errors.items()}

    def draw(ax: "Axes") -> None:
        ax.plot((0, 100), (0, 100), color=LIGHT["muted"], lw=1, dashes=(4, 3))
        for arm, (confidence, accuracy, count) in bins.items():
            colour, share = LIGHT[colours[arm]], count / count.sum()
            # The area is the share of examples, so that an almost empty bin does not catch the eye.
            sizes, look = 5 + 330 * share, {"color": colour, "alpha": 0.75, "linewidths": 0}
            ax.scatter(100 * confidence, 100 * accuracy, s=sizes, marker=markers[arm], **look)
            seen = share >= 0.01
            ax.plot(100 * confidence[seen], 100 * accuracy[seen], color=colour, lw=1, alpha=0.5)
        ax.set_xlim(0, 104)
        ax.set_ylim(-3, 104)
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"])
        ax.set_xlabel("confidence, %")
        ax.set_title("accuracy, %")
        ax.grid()
        named_below(ax, result, labels)

    caption = (
        "How often the network is right, against how sure it is. Below the dashed line it is too sure of itself, "
        "above it not sure enough. The larger a mark, the more test images it stands for; no line leads to the "
        "tiny ones, which say little. "
        "Off by: the mean distance from the line (expected calibration error)."
    )
    said = text.listing([f"{arm} {percent(error)} %" for arm, error in errors.items()])
    alt = f"Reliability diagram, expected calibration error: {said}."
    return Panel(draw, caption, alt, 3.4 + height_below(list(labels.values())))


def _filled_bins(bins: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    confidence, accuracy, count = (
        np.asarray(bins[k], np.float64) for k in ("confidence", "accuracy", "count")
    )
    filled = count > 0
    return confidence[filled], accuracy[filled], count[filled]


def _calibration_error(confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray) -> float:
    return float(count @ np.abs(accuracy - confidence) / count.sum())


def confusion_panel(result: Result, arm: str) -> Panel:
    """True class by predicted class in percent of the true class: numbers where classes are few, else only colours."""
    counts = np.asarray(result["confusion"][arm], np.float64)
    n = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [short(name, 12) for name in result.get("class_names") or map(str, range(n))]
    numbered = n <= _NUMBERED

    def draw(ax: "Axes") -> None:
        (_draw_numbered if numbered else _draw_coloured)(ax, share)
        shown = range(0, n, math.ceil(n / 25))
        ax.set_xticks(shown, [names[i] for i in shown])
        ax.set_yticks(shown, [names[i] for i in shown])
        size = 8 if len(shown) <= _NUMBERED else 6.5
        turned = max(map(len, names)) > (3 if numbered else 1)
        ax.tick_params(axis="x", rotation=90 if turned else 0, length=0, labelsize=size)
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"], labelsize=size)
        ax.spines["bottom"].set_visible(False)
        ax.set(
            xlim=(-0.5, n - 0.5),
            ylim=(n - 0.5, -0.5),
            aspect="equal",
            xlabel="predicted",
            ylabel="true class",
        )
        ax.set_title(f"{short(arm, 22)}: % of each true class")

    correct = percent(float(np.trace(counts) / counts.sum()))
    worst = _confused(share, list(result.get("class_names") or map(str, range(n))))
    caption = f"What {arm} takes each class for. Right answers, {correct} %, are on the diagonal. {worst}"
    caption += (
        ""
        if numbered
        else " The stronger the colour, the more often; the scale is that of a root, so that rare errors show."
    )
    return Panel(
        draw, caption.rstrip(), f"Confusion matrix of {arm}: {correct} % right. {worst}".rstrip(), 4.3
    )


def _draw_numbered(ax: "Axes", share: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for (row, column), part in np.ndenumerate(share):
        if part > 0:
            # Never so strong that the number in it could not be read, on a light page or a dark one.
            look = {"facecolor": LIGHT["s1" if row == column else "s0"], "alpha": 0.08 + 0.44 * part}
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, linewidth=0, **look))
            text = f"{100 * part:.0f}" if part >= 0.005 else "<1"
            ax.text(column, row, text, ha="center", va="center", fontsize=8 if len(share) > 5 else 11)


def _draw_coloured(ax: "Axes", share: np.ndarray) -> None:
    n = len(share)
    # The root lets the eye see one error in a hundred; both colours show on light and dark paper.
    pixels = np.empty((n, n, 4))
    pixels[...] = (0.85, 0.42, 0.15, 0.0)
    pixels[np.arange(n), np.arange(n)] = (0.2, 0.48, 0.82, 0.0)
    pixels[..., 3] = np.sqrt(share)
    ax.imshow(pixels, interpolation="none")


def _confused(share: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent mistake, in a sentence."""
    errors = share - np.diag(np.diag(share))
    row, column = divmod(int(np.argmax(errors)), len(errors))
    if errors[row, column] == 0:
        return ""
    part = percent(float(errors[row, column]))
    return f"The most frequent error: {names[row]} is taken for {names[column]} ({part} % of {names[row]})."


def compression_panel(result: Result) -> Panel:
    """Accuracy against how many times fewer parameters an arm has than the largest, with its latency in words."""
    metric, colours, markers = text.metric_of("accuracy"), colours_of(result), markers_of(result)
    costs = {arm: result["costs"][arm] for arm in _scored(result)}
    largest = max(costs, key=lambda arm: costs[arm]["parameters"])
    times = {arm: costs[largest]["parameters"] / cost["parameters"] for arm, cost in costs.items()}
    latency = {arm: f"{text.number(float(np.median(c['latency_ms'])), None)} ms" for arm, c in costs.items()}
    values = {arm: metric.scale * np.asarray(result["arms"][arm]["accuracy"], np.float64) for arm in costs}
    wide = is_wide(list(times.values()))
    labels = {arm: f"{short(arm)}, {latency[arm]}" for arm in costs}
    below = len(labels) > 6 or max(map(len, labels.values())) > 20

    def draw(ax: "Axes") -> None:
        ax.set_xscale("log")
        for i, (arm, runs) in enumerate(values.items()):
            # Arms of one size stand beside each other.
            x = times[arm] * max(1.5, *times.values()) ** (0.012 * (i - (len(values) - 1) / 2))
            colour = LIGHT[colours[arm]]
            if len(runs) > 1:
                ax.plot((x, x), interval(runs), color=colour, lw=1.8, alpha=0.6)
            ax.plot(x, float(runs.mean()), markers[arm], color=colour, markersize=6)
        if below:
            named_below(ax, result, labels)
        else:
            heights = spread(ax, [float(runs.mean()) for runs in values.values()])
            for arm, y in zip(values, heights, strict=True):
                beside(ax, y, labels[arm], LIGHT[colours[arm]], rows="axes fraction")
        _times_ticks(ax, sorted(set(times.values())), wide=wide)
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"])
        ax.set_xlabel("times fewer parameters")
        ax.set_title("accuracy, %")
        ax.grid(axis="y")

    several = any(len(runs) > 1 for runs in values.values())
    caption = (
        f"Accuracy against how many times fewer parameters an arm has than {largest} "
        f"({costs[largest]['parameters']:,}). Beside each name: the median time for one image. "
    )
    caption += "Upright line: 95 % interval of the mean over seeds." if several else "One seed."
    said = [
        f"{arm} {text.times(times[arm])} fewer, {text.mean_text(result, arm, 'accuracy')}, {latency[arm]}"
        for arm in costs
    ]
    rows = [
        [arm, f"{cost['parameters']:,}", text.times(times[arm]), latency[arm].removesuffix(" ms")]
        for arm, cost in costs.items()
    ]
    folded = Folded("Sizes and times", [(["arm", "parameters", "times fewer", "one image, ms"], rows)])
    alt = f"Accuracy by compression: {'; '.join(said)}."
    return Panel(draw, caption, alt, 2.9 + below * height_below(list(labels.values())), folded)


def _scored(result: Result) -> list[str]:
    """Arms whose cost and accuracy are both known."""
    return [arm for arm in result.get("costs", {}) if "accuracy" in result["arms"][arm]]


def _times_ticks(ax: "Axes", times: Sequence[float], *, wide: bool) -> None:
    """Ticks at the arms' own ratios where they lie apart, else at round numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    scale, apart = np.log10(times), 0.12 * max(math.log10(max(times)), 0.1)
    if len(times) <= 6 and (len(times) == 1 or float(np.diff(scale).min()) > apart):
        ax.set_xticks(list(times), [f"{t:.3g}×" for t in times])
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=9))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    ax.xaxis.set_minor_locator(NullLocator())
    margin = max(times) ** 0.09 * 1.04
    ax.set_xlim(1 / margin, max(times) * margin)


def density_panels(result: Result) -> list[Panel]:
    """Eigenvalue densities of the Hessian, some arms to a figure."""
    return [density_panel(result, arms) for arms in groups(list(result.get("densities", {})))]


def density_panel(result: Result, arms: Sequence[str]) -> Panel:
    """Density of the eigenvalues: mean as a line, lowest to highest seed as a band, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    colours = colours_of(result)
    densities = {arm: result["densities"][arm] for arm in arms}
    found = {
        arm: (np.asarray(d["grid"], float), np.asarray(d["density"], float)) for arm, d in densities.items()
    }
    # Zero has no place on the axis, and a tail of rounding errors says nothing.
    floor = 1e-6 * max(float(runs.max()) for _, runs in found.values())
    labels = {arm: short(arm) for arm in arms}

    def draw(ax: "Axes") -> None:
        ax.set_yscale("log")
        for arm, (grid, runs) in found.items():
            colour = LIGHT[colours[arm]]
            runs = np.maximum(runs, floor)
            if len(runs) > 1:
                ax.fill_between(grid, runs.min(0), runs.max(0), color=colour, alpha=0.18, linewidth=0)
            ax.plot(grid, runs.mean(0), color=colour, lw=1.5)
        ax.axvline(0, color=LIGHT["muted"], lw=0.8, dashes=(4, 3))
        ax.set_ylim(bottom=floor)
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_major_formatter(lambda value, _: _power(value))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"], which="both", length=0)
        ax.set_xlabel("eigenvalue of the Hessian")
        ax.set_title("density")
        ax.grid(axis="y")
        named_below(ax, result, labels)

    several = any(len(runs) > 1 for _, runs in found.values())
    caption = (
        "How the curvature of the loss is distributed: far to the right are directions in which it is sharp, left of "
        "zero those in which it bends down. "
    )
    caption += "Line: mean; band: lowest to highest run or probe." if several else "One run."
    said = [
        f"{arm} up to {grid[runs.max(0) > 1e-6 * runs.max()].max():.3g}"
        for arm, (grid, runs) in found.items()
    ]
    alt = f"Densities of the Hessian's eigenvalues: {text.listing(said)}."
    return Panel(draw, caption, alt, 2.7 + height_below(list(labels.values())))


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
    edges = [-1e101, *levels, 1e101]  # beyond any number of a result
    steps = np.concatenate([step for x, y, _ in surfaces.values() for step in (x, y)])
    first, last = float(steps.min()), float(steps.max())
    centre = {arm: float(loss[x == 0, y == 0].item()) for arm, (x, y, loss) in surfaces.items()}
    said = {arm: text.number(value, None) for arm, value in centre.items()}
    # Data are inches, from the upper left corner of the figure.
    columns = 3 if len(surfaces) == 3 or len(surfaces) > 4 else 2
    width, gap = 4.0, 0.14
    side = (width - gap * (columns - 1)) / columns
    pitch = side + 0.52
    bottom = math.ceil(len(surfaces) / columns) * pitch

    def draw(ax: "Axes") -> None:
        from matplotlib.patches import Rectangle

        for i, (arm, (x, y, loss)) in enumerate(surfaces.items()):
            left, top = i % columns * (side + gap), i // columns * pitch + 0.24
            scale = side / (last - first)
            across, down = left + scale * (x - first), top + scale * (last - y)
            ax.contourf(across, down, loss.T, levels=edges, colors=_shades(levels))
            crossed = [level for level in levels if loss.min() < level < loss.max()]
            if crossed:
                ax.contour(across, down, loss.T, levels=crossed, colors=LIGHT["ink"], linewidths=0.5)
            ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=LIGHT["muted"], lw=0.6))
            ax.plot(left - scale * first, top + scale * last, "o", color=LIGHT["ink"], markersize=3.5)
            ax.text(left, top - 0.05, short(arm, 16 if columns == 3 else 24), va="bottom", fontsize=9)
            ax.text(left, top + side + 0.05, f"dot: {said[arm]}", va="top", fontsize=8, color=LIGHT["muted"])
        wide = width / (len(levels) + 1)
        ax.text(0, bottom + 0.18, "loss", va="bottom", fontsize=9)
        for i, shade in enumerate(_shades(levels)):
            ax.add_patch(Rectangle((i * wide, bottom + 0.22), wide, 0.16, facecolor=shade, linewidth=0))
        for i, level in enumerate(levels, 1):
            ax.plot((i * wide, i * wide), (bottom + 0.22, bottom + 0.38), color=LIGHT["ink"], lw=0.5)
            look = {"ha": "center", "va": "top", "fontsize": 8, "color": LIGHT["muted"]}
            ax.text(i * wide, bottom + 0.42, f"{level:g}", **look)
        ax.set(xlim=(-0.02, width + 0.02), ylim=(bottom + 0.58, 0), aspect="equal", anchor="NW")
        ax.axis("off")

    caption = (
        "The loss around the final weights of each arm's first run, on a flat cut along two random directions. Dot: "
        "those weights; under the square, their loss. At an edge every unit's weights have moved by "
        f"{100 * max(-first, last):g} % of their size. The stronger the colour, the higher the loss; colours and lines "
        "mean the same in every square. A plane shows little of thousands of dimensions: along others the loss may "
        "fall where it rises here."
    )
    told = [
        f"{arm} {said[arm]} there and up to {text.number(float(loss.max()), None)}"
        for arm, (_, _, loss) in surfaces.items()
    ]
    alt = f"Contours of the loss over a plane through the final weights: {text.listing(told)}."
    return Panel(draw, caption, alt, bottom + 0.65)


def _levels(low: float, high: float) -> list[float]:
    """Round numbers between two losses: in equal steps, or in equal factors where they lie far apart."""
    from matplotlib.ticker import MaxNLocator

    least = max(low, 1e-6 * high)  # a loss of zero has no factor to others
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
    """A colour below, between and above the levels, never so strong that a line over it could not be seen."""
    from matplotlib.colors import to_rgba

    return [to_rgba(LIGHT["s1"], alpha) for alpha in np.linspace(0.04, 0.7, len(levels) + 1)]


def overlay_panel(result: Result) -> Panel:
    """Image, map, and the map over the image in grey, one row each."""
    shown = result["overlays"][:_OVERLAYS]
    signed = any(np.min(overlay["map"]) < 0 for overlay in shown)
    row_height = 1.24

    def draw(ax: "Axes") -> None:
        for row, overlay in enumerate(shown):
            image, tinted = np.asarray(overlay["image"], np.uint8), _tinted(overlay["map"])
            grey = np.repeat(image.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
            colour = image if image.shape[-1] == 3 else grey
            top = row * row_height
            for column, layers in enumerate(([colour], [tinted], [grey, tinted])):
                for layer in layers:
                    _place(ax, layer, column * 1.06, top)
            ax.text(0, top - 0.04, short(overlay["title"], 58), va="bottom", fontsize=9)
        ax.set(xlim=(0, 3.12), ylim=(len(shown) * row_height - 0.22, -0.2), aspect="equal", anchor="NW")
        ax.axis("off")

    left = len(result["overlays"]) - len(shown)
    caption = (
        "Left: the image. Middle: what the network looked at; the stronger the colour, the more it counts. "
    )
    caption += "Right: both, the image in grey. "
    caption += "Orange speaks for the answer, blue against it. " if signed else ""
    caption += f"{left} more {'are' if left > 1 else 'is'} not drawn." if left else ""
    titles = text.listing([overlay["title"] for overlay in shown])
    height = 0.2 + 1.33 * row_height * len(shown)
    return Panel(draw, caption.strip(), f"Images with attribution maps: {titles}.", height)


def _tinted(values: Any) -> np.ndarray:
    """A map as colours: orange above zero, blue below it, transparent at zero, full at its largest size."""
    values = np.asarray(values, np.float64)
    part = values / (float(np.abs(values).max()) or 1.0)
    pixels = np.empty((*values.shape, 4))
    pixels[...] = (0.93, 0.36, 0.05, 0.0)
    pixels[part < 0] = (0.13, 0.45, 0.95, 0.0)
    pixels[..., 3] = 0.92 * np.abs(part)
    return pixels


def _place(ax: "Axes", pixels: np.ndarray, left: float, top: float) -> None:
    """Draws an image into the unit square at a corner, with a hairline around it."""
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    wide, high = width / max(height, width), height / max(height, width)
    ax.imshow(pixels, extent=(left, left + wide, top + high, top), interpolation="none")
    ax.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=LIGHT["grid"], linewidth=0.6))
