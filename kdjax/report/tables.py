"""Arms by metrics: the table of a result, as cells and as Markdown."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax import significance
from kdjax.report import text
from kdjax.report.text import Result

# Measures of flatness by what their columns are called, in this order.
_FLATNESS = {
    "loss": "loss on these images",
    "gradient_norm": "norm of its gradient",
    "lambda_max": "largest eigenvalue, raw",
    "lambda_max/filter_normalised": "largest eigenvalue, filter-normalised",
    "trace": "trace, raw",
    "trace/filter_normalised": "trace, filter-normalised",
    "sharpness": "sharpness, raw",
    "sharpness/filter_normalised": "sharpness, filter-normalised",
    "lambda_min": "smallest eigenvalue, raw",
}
_ERRORS = (("largest eigenvalues", "lambda_max_residual", "lambda_max"), ("traces", "trace_error", "trace"))


class Cell(NamedTuple):
    """A printed value, what stands beside it in small type, and whether it is set in bold."""

    text: str
    small: str = ""
    bold: bool = False


def markdown_table(
    result: Result, *, metrics: Sequence[str] | None = None, baseline: str | None = None
) -> str:
    """Arms by metrics as a Markdown table: mean ± sd over n seeds, p of Welch's test against the baseline.

    The p of a column are corrected for their number by Holm's method; stars beside them say how small they are, as
    :func:`p_legend` explains. Fractions are printed as percent. The best mean
    of a column is bold only where Welch's p against the runner-up is below .05. The teacher stands in the table but is
    neither tested nor bold.

    Args:
      result: as read by :func:`kdjax.results.read`.
      metrics: columns in this order; all metrics of the arms when None.
      baseline: the arm that the others are tested against; when None, the one of the result's first comparison, or
        the first arm that is not the teacher.

    Raises:
      ValueError: if a metric or the baseline is none of the result's.
    """
    return _markdown(*table(result, metrics, baseline))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [[*head], [":--"] + ["--:"] * (len(head) - 1)]
    lines += [[_markdown_cell(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(_markdown_escape(c) for c in line) + " |" for line in lines) + "\n"


def table(
    result: Result, metrics: Sequence[str] | None = None, baseline: str | None = None
) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of cells of the table that :func:`markdown_table` describes."""
    known = text.measured(result)
    metrics = known if metrics is None else list(metrics)
    baseline = text.baseline_of(result) if baseline is None else baseline
    for what, name, names in [("metric", m, known) for m in metrics] + [("arm", baseline, [*result["arms"]])]:
        if name is not None and name not in names:
            raise ValueError(f"{result['name']} has no {what} {name!r}; write one of {', '.join(names)}.")
    best = {metric: text.best_arm(result, metric) for metric in metrics}
    tests = {metric: text.adjusted_p(result, metric, baseline) for metric in metrics}
    rows = []
    for arm, measured in result["arms"].items():
        n = max((len(values) for values in measured.values()), default=0)
        cells = [_cell(result, arm, m, tests[m].get(arm))._replace(bold=best[m] == arm) for m in metrics]
        rows.append([Cell(arm), Cell(str(n)), *cells])
    return ["arm", "n", *map(_heading, metrics)], rows


def markdown_flatness(result: Result) -> str:
    """Arms by measures of flatness as a Markdown table, as :func:`markdown_table` has them, and what they mean."""
    head, rows = flatness_table(result)
    return f"{_markdown(head, rows)}\n<sub>{flatness_legend(result, rows)}</sub>\n"


def flatness_table(result: Result) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of cells: the loss first, then each measure raw and filter-normalised, side by side."""
    arms = {
        arm: {title: measures[name] for name, title in _FLATNESS.items() if name in measures}
        for arm, measures in result["flatness"].items()
    }
    baseline = text.baseline_of(result)
    return table({**result, "arms": arms}, baseline=baseline if baseline in arms else None)


def flatness_legend(result: Result, rows: Sequence[Sequence[Cell]]) -> str:
    """What the numbers of a flatness table do and do not say, in a few sentences."""
    exact = [
        f"the {what} within {max(0.1, error):,.1f} %"
        for what, name, of in _ERRORS
        if (error := _largest_error(result, name, of)) is not None
    ]
    said = (
        "All on the same images. Curvature shrinks with the loss by itself (Granziol, Flatness is a False Friend, "
        "2020), so compare only arms whose loss is about equal.",
        "Raw numbers change when one layer is multiplied by a factor and the next divided by it, although the network "
        "stays the same (Dinh et al., 2017); filter-normalised ones do not.",
        "Sharpness: the largest increase of the loss found within a radius.",
        f"Measured are {text.listing(exact)}." if exact else "",
        p_legend(result, rows),
    )
    return " ".join(filter(None, said))


def p_legend(result: Result, rows: Sequence[Sequence[Cell]], baseline: str | None = None) -> str:
    """Explains the p and stars of a table in a sentence; empty where it holds none."""
    small = [cell.small for row in rows for cell in row if cell.small]
    if not small:
        return ""
    baseline = text.baseline_of(result) if baseline is None else baseline
    legend = f"p: Welch's test against {baseline}, with Holm's correction for the arms of a column"
    starred = any(cell.endswith("*") for cell in small)
    return legend + ("; * p < .05, ** p < .01, *** p < .001." if starred else ".")


def _largest_error(result: Result, error: str, of: str) -> float | None:
    """The largest error of a measure in percent of it, over the arms; None where it is not known."""
    shares = [
        100 * float(np.mean(np.abs(measures[error])) / np.mean(np.abs(measures[of])))
        for measures in result["flatness"].values()
        if error in measures and np.any(measures.get(of, 0))
    ]
    return max(shares, default=None)


def _heading(name: str) -> str:
    metric = text.metric_of(name)
    arrow = "" if metric.higher is None else " ↑" if metric.higher else " ↓"
    return text.axis_title(metric) + arrow


def _cell(result: Result, arm: str, name: str, p: float | None) -> Cell:
    if name not in result["arms"][arm]:
        return Cell("\N{EN DASH}")
    metric, decimals = text.metric_of(name), text.decimals_of(result, name)
    values = metric.scale * np.asarray(result["arms"][arm][name], np.float64)
    mean, sd, n = significance.summarise(values.tolist())
    decimals = text.places(mean) if decimals is None else decimals
    text = text.number(mean, decimals)
    if n > 1 and (decimals or np.ptp(values) > 0):
        text += f" ± {text.number(sd, decimals)}"
    return Cell(text, "" if p is None else f"{text.p_text(p)} {text.stars(p)}".rstrip())


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.bold else cell.text
    return f"{text} ({cell.small})" if cell.small else text


def _markdown_escape(text: str) -> str:
    """Keeps a name from ending its cell or starting a tag."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("|", "&#124;")).split())
