"""Figures of trained networks: compression, robustness, calibration, confusion and attributions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.report import text
from kdjax.report.comparisons import Result
from kdjax.report.figures import style
from kdjax.report.figures.style import Axes, Panel, Table

_MATRICES = 3  # arms that get a confusion matrix
_NUMBERED = 12  # classes up to which its cells hold numbers
_OVERLAYS = 12  # images drawn
_ACCURACY = text.METRICS["accuracy"]

# Kind of perturbation → its title, the unit of its size, and its place; corruptions come second.
_PERTURBATIONS = {
    "clean": ("clean", "", 0),
    "mean_corruption": ("all corruptions", "", 2),
    "weight_noise": ("weight noise", "relative deviation", 3),
    "fgsm": ("FGSM attack", "grey levels", 4),
    "pgd": ("PGD attack", "grey levels", 5),
}


def panels(result: Result) -> list[Panel]:
    """The figures of this module for which the result has data."""
    found = [compression_panel(result)] if _scored(result) else []
    found += [robustness_panel(result)] if _perturbations(result) else []
    found += [reliability_panel(result, arms) for arms in style.groups(list(result.get("calibration", {})))]
    found += [confusion_panel(result, arm) for arm in list(result.get("confusion", {}))[:_MATRICES]]
    return found + ([overlay_panel(result)] if result.get("overlays") else [])


def robustness_panel(result: Result) -> Panel:
    """One row per kind of perturbation, one mark per arm with its 95 % interval over the seeds."""
    kinds, colours, markers = _perturbations(result), style.colours_of(result), style.markers_of(result)
    arms = [arm for arm in result["robustness"] if any(arm in sizes for sizes in kinds.values())]
    means = {
        kind: {arm: 100 * np.mean(list(by_size.values()), axis=0) for arm, by_size in found.items()}
        for kind, found in kinds.items()
    }
    labels = {arm: style.short(arm) for arm in arms}
    step = min(0.2, 0.72 / max(1, len(arms) - 1))  # between the marks of a row

    def draw(ax: Axes) -> None:
        for row, found in enumerate(means.values()):
            if row:
                ax.axhline(row - 0.5, color=style.GRID, lw=0.8, zorder=0)
            for i, arm in enumerate(arms):
                if arm not in found:
                    continue
                colour, y = colours[arm], row + step * (i - (len(arms) - 1) / 2)
                if len(found[arm]) > 1:
                    low, high = style.interval(found[arm])
                    ax.plot((max(low, 0), min(high, 100)), (y, y), color=colour, lw=1.6, alpha=0.6)
                ax.plot(float(found[arm].mean()), y, markers[arm], color=colour, markersize=5)
        ax.set_yticks(range(len(means)), [_perturbation(kind)[0] for kind in means])
        ax.set_ylim(len(means) - 0.5, -0.5)
        ax.set_title(text.axis_title(_ACCURACY))
        ax.grid(axis="x")
        style.legend_below(ax, result, labels)

    several = any(len(runs) > 1 for found in means.values() for runs in found.values())
    caption = "Test accuracy on clean images and under each perturbation, averaged over its sizes. "
    caption += "Mark: mean over seeds; line: its 95 % interval." if several else "One seed."
    rows = {
        kind: text.listing([f"{arm} {text.number(float(runs.mean()), 1)} %" for arm, runs in found.items()])
        for kind, found in means.items()
    }
    alt = "; ".join(f"{_perturbation(kind)[0]}: {listed}" for kind, listed in rows.items())
    height = 0.75 + len(means) * max(0.3, 0.13 + 0.095 * len(arms)) + style.legend_height(labels)
    return Panel(draw, caption, f"Accuracy by perturbation. {alt}.", height, _robustness_table(kinds, arms))


def _robustness_table(kinds: Mapping[str, Any], arms: Sequence[str]) -> Table:
    """One row per perturbation and size, one column per arm."""
    rows = []
    for kind, found in kinds.items():
        title, unit, _ = _perturbation(kind)
        for size in sorted({size for by_size in found.values() for size in by_size}):
            runs = [found.get(arm, {}).get(size) for arm in arms]
            cells = ["–" if values is None else text.mean_sd(values, _ACCURACY) for values in runs]
            rows.append([f"{title}, {unit} {size:g}" if unit else title, *cells])
    return Table("Accuracy at every size, %", ["perturbation", *arms], rows)


def _perturbations(result: Result) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Accuracies as kind → arm → size → one per seed, in the order of the figure."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for arm, perturbations in result.get("robustness", {}).items():
        for name, values in perturbations.items():
            kind, *rest = name.split("/")
            if len(rest) < 2:  # else it is another metric than accuracy
                found.setdefault(kind, {}).setdefault(arm, {})[float(rest[0]) if rest else 0.0] = values
    return dict(sorted(found.items(), key=lambda item: _perturbation(item[0])[2]))


def _perturbation(kind: str) -> tuple[str, str, int]:
    """Title, unit of the size, and place of a kind of perturbation."""
    return _PERTURBATIONS.get(kind, (kind.replace("_", " "), "severity", 1))


def reliability_panel(result: Result, arms: Sequence[str]) -> Panel:
    """Reliability diagram: accuracy against confidence, bin by bin, with the diagonal of perfect calibration."""
    colours, markers = style.colours_of(result), style.markers_of(result)
    bins = {arm: _filled_bins(result["calibration"][arm]) for arm in arms}
    errors = {
        arm: f"{text.number(100 * float(count @ np.abs(accuracy - confidence) / count.sum()), 1)} %"
        for arm, (confidence, accuracy, count) in bins.items()
    }
    labels = {arm: f"{style.short(arm)}, ECE {error}" for arm, error in errors.items()}

    def draw(ax: Axes) -> None:
        ax.plot((0, 100), (0, 100), color=style.MUTED, lw=1, dashes=(4, 3))
        for arm, (confidence, accuracy, count) in bins.items():
            colour, share = colours[arm], count / count.sum()
            sizes, look = 5 + 330 * share, {"color": colour, "alpha": 0.75, "linewidths": 0}
            ax.scatter(100 * confidence, 100 * accuracy, s=sizes, marker=markers[arm], **look)
            seen = share >= 0.01
            ax.plot(100 * confidence[seen], 100 * accuracy[seen], color=colour, lw=1, alpha=0.5)
        ax.set_xlim(0, 104)
        ax.set_ylim(-3, 104)
        style.value_axis(ax, "confidence, %", text.axis_title(_ACCURACY))
        ax.grid(axis="x")
        style.legend_below(ax, result, labels)

    caption = (
        "Accuracy against confidence. Below the dashed line the network is overconfident, above it underconfident. "
        "The area of a mark is its share of the test images; bins of less than 1 % are not joined by the line. ECE: "
        "expected calibration error, the mean distance from the dashed line."
    )
    listed = text.listing([f"{arm} {error}" for arm, error in errors.items()])
    alt = f"Reliability diagram, expected calibration error: {listed}."
    return Panel(draw, caption, alt, 3.4 + style.legend_height(labels))


def _filled_bins(bins: Mapping[str, Sequence[float]]) -> list[np.ndarray]:
    """Confidence, accuracy and count of the bins that hold an example."""
    filled = np.asarray(bins["count"]) > 0
    return [np.asarray(bins[name], np.float64)[filled] for name in ("confidence", "accuracy", "count")]


def confusion_panel(result: Result, arm: str) -> Panel:
    """True class by predicted class in percent of the true class: numbers where classes are few, else only colours."""
    counts = np.asarray(result["confusion"][arm], np.float64)
    n = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = list(result.get("class_names") or map(str, range(n)))
    numbered = n <= _NUMBERED

    def draw(ax: Axes) -> None:
        _draw_matrix(ax, share, numbered=numbered)
        ticks = range(0, n, math.ceil(n / 25))
        labels = [style.short(names[i], 12) for i in ticks]
        ax.set_xticks(ticks, labels)
        ax.set_yticks(ticks, labels)
        size = 8 if len(ticks) <= _NUMBERED else 6.5
        turned = max(map(len, labels)) > (3 if numbered else 1)
        ax.tick_params(axis="x", rotation=90 if turned else 0, length=0, labelsize=size)
        ax.tick_params(axis="y", labelcolor=style.MUTED, labelsize=size)
        ax.spines["bottom"].set_visible(False)
        ax.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
        ax.set(xlabel="predicted", ylabel="true class", title=f"{style.short(arm, 22)}: % of each true class")

    correct = text.number(100 * float(np.trace(counts) / counts.sum()), 1)
    worst = _confused(share, names)
    caption = f"Confusion matrix of {arm}. The diagonal holds the right answers, {correct} % of all. {worst}"
    caption += "" if numbered else " Opacity: square root of the share, so that rare errors show."
    alt = f"Confusion matrix of {arm}: {correct} % right. {worst}"
    return Panel(draw, caption.rstrip(), alt.rstrip(), 4.3)


def _draw_matrix(ax: Axes, share: np.ndarray, *, numbered: bool) -> None:
    """Cells coloured by their share, blue on the diagonal and orange beside it; with a number if there is room."""
    diagonal = np.eye(len(share), dtype=bool)[..., None]
    colours = np.where(diagonal, (0.2, 0.48, 0.82), (0.85, 0.42, 0.15))
    alpha = 0.52 * share if numbered else np.sqrt(share)
    ax.imshow(np.dstack([colours, alpha]), interpolation="none")
    for (row, column), part in np.ndenumerate(share):
        if numbered and part > 0:
            label = f"{100 * part:.0f}" if part >= 0.005 else "<1"
            ax.text(column, row, label, ha="center", va="center", fontsize=8 if len(share) > 5 else 11)


def _confused(share: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent mistake, in a sentence."""
    errors = share - np.diag(np.diag(share))
    row, column = divmod(int(np.argmax(errors)), len(errors))
    if errors[row, column] == 0:
        return ""
    part = text.number(100 * float(errors[row, column]), 1)
    return f"The most frequent error: {names[row]} is taken for {names[column]} ({part} % of {names[row]})."


def compression_panel(result: Result) -> Panel:
    """Accuracy against how many times fewer parameters an arm has than the largest, with its latency."""
    colours, markers = style.colours_of(result), style.markers_of(result)
    costs = {arm: result["costs"][arm] for arm in _scored(result)}
    largest = max(costs, key=lambda arm: costs[arm]["parameters"])
    times = {arm: costs[largest]["parameters"] / cost["parameters"] for arm, cost in costs.items()}
    latency = {arm: text.number(float(np.median(cost["latency_ms"])), None) for arm, cost in costs.items()}
    values = {arm: 100 * np.asarray(result["arms"][arm]["accuracy"], np.float64) for arm in costs}
    labels = {arm: f"{style.short(arm)}, {latency[arm]} ms" for arm in costs}

    def draw(ax: Axes) -> None:
        ratios = np.unique(list(times.values()))
        style.value_ticks(ax, ratios, log=True, label="{:.3g}×")
        for i, (arm, runs) in enumerate(values.items()):
            part = 0.012 * (i - (len(values) - 1) / 2)
            x = float(style.shifted(ratios, part, log=True)[np.searchsorted(ratios, times[arm])])
            if len(runs) > 1:
                ax.plot((x, x), style.interval(runs), color=colours[arm], lw=1.8, alpha=0.6)
            ax.plot(x, float(runs.mean()), markers[arm], color=colours[arm], markersize=6)
        style.value_axis(ax, "times fewer parameters", text.axis_title(_ACCURACY))
        style.legend_below(ax, result, labels)

    caption = (
        f"Accuracy against how many times fewer parameters an arm has than {largest} "
        f"({costs[largest]['parameters']:,}). Beside each name: the median time for one image. "
    )
    several = any(len(runs) > 1 for runs in values.values())
    caption += "Vertical line: 95 % interval of the mean over seeds." if several else "One seed."
    points = [
        f"{arm} {text.times(times[arm])} fewer, {text.mean_text(result, arm, 'accuracy')}, {latency[arm]} ms"
        for arm in costs
    ]
    rows = [[arm, f"{c['parameters']:,}", text.times(times[arm]), latency[arm]] for arm, c in costs.items()]
    table = Table("Sizes and times", ["arm", "parameters", "times fewer", "one image, ms"], rows)
    alt = f"Accuracy by compression: {'; '.join(points)}."
    return Panel(draw, caption, alt, 2.9 + style.legend_height(labels), table)


def _scored(result: Result) -> list[str]:
    """Arms whose cost and accuracy are both known."""
    return [arm for arm in result.get("costs", {}) if "accuracy" in result["arms"][arm]]


def overlay_panel(result: Result) -> Panel:
    """Image, attribution map, and the map over the grey image, one row each."""
    chosen = result["overlays"][:_OVERLAYS]
    signed = any(np.min(overlay["map"]) < 0 for overlay in chosen)
    row_height = 1.24

    def draw(ax: Axes) -> None:
        for row, overlay in enumerate(chosen):
            image, tinted = np.asarray(overlay["image"], np.uint8), _tinted(overlay["map"])
            grey = np.repeat(image.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
            colour = image if image.shape[-1] == 3 else grey
            top = row * row_height
            for column, layers in enumerate(([colour], [tinted], [grey, tinted])):
                for layer in layers:
                    _place(ax, layer, column * 1.06, top)
            ax.text(0, top - 0.04, style.short(overlay["title"], 58), va="bottom", fontsize=9)
        ax.set(xlim=(0, 3.12), ylim=(len(chosen) * row_height - 0.22, -0.2), aspect="equal", anchor="NW")
        ax.axis("off")

    left = len(result["overlays"]) - len(chosen)
    caption = (
        "Left: the image. Middle: its attribution map; stronger colour is a larger attribution. Right: both. "
    )
    caption += "Orange raises the score, blue lowers it. " if signed else ""
    caption += f"{left} more {'are' if left > 1 else 'is'} not drawn." if left else ""
    titles = text.listing([overlay["title"] for overlay in chosen])
    height = 0.2 + 1.33 * row_height * len(chosen)
    return Panel(draw, caption.strip(), f"Images with attribution maps: {titles}.", height)


def _tinted(values: Any) -> np.ndarray:
    """A map as colours: orange above zero, blue below, transparent at zero, opaque at its largest size."""
    values = np.asarray(values, np.float64)
    part = values / (float(np.abs(values).max()) or 1.0)
    pixels = np.empty((*values.shape, 4))
    pixels[...] = (0.93, 0.36, 0.05, 0.0)
    pixels[part < 0] = (0.13, 0.45, 0.95, 0.0)
    pixels[..., 3] = 0.92 * np.abs(part)
    return pixels


def _place(ax: Axes, pixels: np.ndarray, left: float, top: float) -> None:
    """Draws an image into the unit square at a corner, with a thin frame."""
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    wide, high = width / max(height, width), height / max(height, width)
    ax.imshow(pixels, extent=(left, left + wide, top + high, top), interpolation="none")
    ax.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=style.GRID, linewidth=0.6))
