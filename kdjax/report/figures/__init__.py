"""The figures of a result, in order, and its main figure as an image file.

To add a kind of figure, write a function that returns a :class:`Panel` in one of these modules, and call it in
:func:`panels`.

* ``runs``: every seed of every arm, training curves, ratios to other libraries.
* ``searches``: what a sweep and a hyperparameter search have found.
* ``networks``: robustness, calibration, confusion, compression and attributions of trained networks.
* ``curvature``: eigenvalue densities of the Hessian, and loss surfaces.
"""

import io
import os
import textwrap
from pathlib import Path

from kdjax import files
from kdjax.extras import extra
from kdjax.report.comparisons import Result
from kdjax.report.figures import curvature, networks, runs, searches
from kdjax.report.figures.style import MUTED, STYLE, Panel


def panels(result: Result) -> list[Panel]:
    """All figures of a result: first what answers its question, then what explains the answer."""
    return [
        *runs.arm_panels(result),
        *searches.swept_panels(result),
        *searches.trial_panels(result),
        *networks.panels(result),
        *runs.curve_panels(result),
        *curvature.panels(result),
    ]


def save_figure(path: str | os.PathLike[str], result: Result) -> None:
    """Writes the result's main figure as an image: its arms and, on the right, its first sweep or curves.

    The suffix of the path decides the format: ``.png``, ``.svg``, ``.pdf``.

    Raises:
      ValueError: if the result has nothing to draw, or the suffix is not an image format.
    """
    with extra("report"):
        import matplotlib
        from matplotlib.figure import Figure

    chosen = [*runs.arm_panels(result), *searches.swept_panels(result), *runs.curve_panels(result)][:2]
    if not chosen:
        raise ValueError(f"{result['name']} holds no arms, ratios or curves to draw.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(chosen), max(p.height for p in chosen)), layout="constrained")
        axes = figure.subplots(1, len(chosen), squeeze=False, gridspec_kw={"wspace": 0.12})
        for ax, panel in zip(axes[0], chosen, strict=True):
            panel.draw(ax)
        sides = ("Left: ", "Right: ") if chosen[1:] else ("",)
        captions = [side + panel.caption for side, panel in zip(sides, chosen, strict=True)]
        lines = [line for caption in captions for line in textwrap.wrap(caption, 70 * len(chosen))]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small", color=MUTED)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or None, dpi=180)
    files.write_bytes(path, buffer.getvalue())
