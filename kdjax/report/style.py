"""What all figures share: the :class:`Panel`, its colours and marks, labels that do not overlap, and its SVG."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from kdjax import significance
from kdjax.extras import extra
from kdjax.report import text
from kdjax.report.text import Result

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
MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # of arms that share a colour


class Folded(NamedTuple):
    """The numbers of a figure, folded away under it: blocks of rows, each with headings of its own."""

    summary: str
    blocks: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]


class Panel(NamedTuple):
    """One figure: how to draw it on axes, what stands under it, what it shows in words, its height in inches."""

    draw: Callable[["Axes"], None]
    caption: str
    alt: str
    height: float
    folded: Folded | None = None


def svg(panel: Panel, *, key: str) -> str:
    """One panel as an inline ``<svg>`` that takes colours and font from the page around it.

    Args:
      panel: what to draw.
      key: differs between the figures of a page, so that their internal names do not clash.
    """
    with extra("experiments"):
        import matplotlib
        from matplotlib.figure import Figure

    with matplotlib.rc_context(
        style({"svg.fonttype": "none", "svg.hashsalt": key} | {"image.composite_image": False})
    ):
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
        if element.tag in (
            "g",
            "image",
        ):  # nothing refers to it, and an image drawn twice would have it twice
            attributes.pop("id", None)
        if "style" in attributes:
            colour = re.compile("#[0-9a-f]{6}")
            attributes["style"] = colour.sub(lambda m: variables.get(m[0], m[0]), attributes["style"])
        element.attrib = attributes
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode", method="html")


def style(more: Mapping[Any, Any] = {}) -> dict[Any, Any]:
    """Settings of matplotlib for all figures."""
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
    arms = _lines_of(result)
    competing = [arm for arm in arms if arm not in text.REFERENCES]
    colours = {arm: SERIES[i % len(SERIES)] for i, arm in enumerate(competing)}
    return colours | {arm: "muted" for arm in arms if arm in text.REFERENCES}


def _lines_of(result: Result) -> list[str]:
    """Whatever has a colour: the arms, and the lines of sweeps, which may have names of their own."""
    swept = [line for sweep in result.get("swept", []) for line in sweep["arms"]]
    return list(dict.fromkeys([*result["arms"], *result.get("curves", {}), *swept]))


def markers_of(result: Result) -> dict[str, str]:
    """One marker per arm: arms beyond the number of colours are told apart by it."""
    lines = _lines_of(result)
    competing = [arm for arm in lines if arm not in text.REFERENCES]
    markers = {arm: MARKERS[i // len(SERIES) % len(MARKERS)] for i, arm in enumerate(competing)}
    return markers | {arm: "o" for arm in lines if arm in text.REFERENCES}


def named_below(ax: "Axes", result: Result, labels: Mapping[str, str]) -> None:
    """Writes under the figure which mark is which arm's; ``labels`` are arm → text."""
    from matplotlib.lines import Line2D

    colours, markers = colours_of(result), markers_of(result)
    handles = [
        Line2D(
            [], [], color=LIGHT[colours[arm]], marker=markers[arm], linestyle="", markersize=6, label=label
        )
        for arm, label in labels.items()
    ]
    root: Any = ax.figure
    root.legend(
        handles=handles,
        loc="outside lower left",
        ncols=_columns(list(labels.values())),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=1.2,
        borderpad=0.2,
    )


def height_below(labels: Sequence[str]) -> float:
    """Inches that :func:`named_below` takes."""
    return 0.12 + 0.17 * math.ceil(len(labels) / _columns(labels))


def _columns(labels: Sequence[str]) -> int:
    return max(1, min(len(labels), 54 // (4 + max(map(len, labels)))))


def groups(arms: Sequence[str], size: int = 4) -> list[list[str]]:
    """Arms in groups, for figures that hold only few of them, the groups about equally large."""
    count = math.ceil(len(arms) / size)
    return [list(part) for part in np.array_split(np.asarray(arms, object), count)] if count else []


def percent(value: float, decimals: int = 1) -> str:
    """A fraction in percent, without its sign."""
    return text.number(100 * value, decimals)


def is_wide(values: Sequence[float]) -> bool:
    """Whether values are better shown on a logarithmic axis: all above zero, the largest 30 times the smallest."""
    return min(values) > 0 and max(values) > 30 * min(values)


def spread(ax: "Axes", values: Sequence[float], gap: float = 0.085) -> list[float]:
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


def beside(ax: "Axes", y: float, text: str, colour: str, *, rows: str = "data") -> None:
    """Writes to the right of the axes, at a height in data or in axes coordinates."""
    ax.annotate(text, (1.03, y), xycoords=("axes fraction", rows), va="center", color=colour)


def short(text: str, width: int = 24) -> str:
    """Cuts a long name in the middle: names that begin alike often end differently."""
    tail = width // 2 - 1
    return text if len(text) <= width else f"{text[: width - tail - 1]}…{text[-tail:]}"


def in_two_lines(text: str, width: int = 24) -> str:
    """Breaks a long name of a row, after a space or an underscore where there is one."""
    if len(text) <= width:
        return text
    cut = max(text.rfind(" ", 0, width), text.rfind("_", 0, width)) + 1 or width
    return f"{text[:cut].rstrip()}\n{short(text[cut:], width)}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % t-interval of the mean of at least two values."""
    with extra("experiments"):
        from scipy import stats

    mean, sd, n = significance.summarise(values.tolist())
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half
