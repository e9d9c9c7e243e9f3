"""Which figures a result has, in which order, and its main figure as an image file.

A new kind of figure is a new function that returns a :class:`Panel`, in :mod:`kdjax.report.run_figures` or
:mod:`kdjax.report.network_figures`, and a line in :func:`panels`.
"""

import io
import os
import textwrap
from pathlib import Path

from kdjax import files
from kdjax.extras import extra
from kdjax.report import network_figures, run_figures, text
from kdjax.report.style import LIGHT, Panel, style
from kdjax.report.text import Result


def panels(result: Result) -> list[Panel]:
    """The figures of a result, from what answers its question to what explains the answer."""
    return [
        *_arm_panels(result),
        *run_figures.swept_panels(result),
        *run_figures.trial_panels(result),
        *network_figures.panels(result),
        *_curve_panels(result),
        *network_figures.density_panels(result),
        *([network_figures.surface_panel(result)] if result.get("surfaces") else []),
    ]


def main_panels(result: Result) -> list[Panel]:
    """Those of :func:`panels` that need no key under them, for an image."""
    return [*_arm_panels(result), *run_figures.swept_panels(result), *_curve_panels(result)]


def _arm_panels(result: Result) -> list[Panel]:
    found = [run_figures.ratio_panel(result)] if result.get("ratios") else []
    primary = text.primary_of(result)
    return found if primary is None else [*found, run_figures.dot_panel(result, metric=primary)]


def _curve_panels(result: Result) -> list[Panel]:
    primary = text.primary_of(result)
    names = dict.fromkeys(m for curves in result.get("curves", {}).values() for m in curves)
    # Curves of the metric in question come first.
    ordered = sorted(names, key=lambda name: primary is None or primary not in name)
    return [run_figures.curve_panel(result, metric=name) for name in ordered]


def save_figure(path: str | os.PathLike[str], result: Result) -> None:
    """Writes the result's main figure as an image: its arms and, beside them, what it varied or its curves.

    Args:
      path: of the image; the suffix decides the format (``.png``, ``.svg``, ``.pdf``).
      result: as read by :func:`kdjax.results.read`.

    Raises:
      ValueError: if the result has nothing to draw, or the suffix is no image format.
    """
    with extra("experiments"):
        import matplotlib
        from matplotlib.figure import Figure

    shown = main_panels(result)[:2]
    if not shown:
        raise ValueError(f"{result['name']} holds no arms, ratios or curves to draw.")
    with matplotlib.rc_context(style()):
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
