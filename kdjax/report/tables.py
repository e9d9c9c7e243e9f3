"""Arms by metrics: the table of a result, as cells and as Markdown."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax import significance
from kdjax.report import words
from kdjax.report.words import Result


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
    head, rows = table(result, metrics, baseline)
    lines = [head, [":--"] + ["--:"] * (len(head) - 1)]
    lines += [[_markdown_cell(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(_markdown_escape(c) for c in line) + " |" for line in lines) + "\n"


def table(
    result: Result, metrics: Sequence[str] | None = None, baseline: str | None = None
) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of cells of the table that :func:`markdown_table` describes."""
    known = words.measured(result)
    metrics = known if metrics is None else list(metrics)
    baseline = words.baseline_of(result) if baseline is None else baseline
    for what, name, names in [("metric", m, known) for m in metrics] + [("arm", baseline, [*result["arms"]])]:
        if name is not None and name not in names:
            raise ValueError(f"{result['name']} has no {what} {name!r}; write one of {', '.join(names)}.")
    best = {metric: words.best_arm(result, metric) for metric in metrics}
    tests = {metric: words.adjusted_p(result, metric, baseline) for metric in metrics}
    rows = []
    for arm, measured in result["arms"].items():
        n = max((len(values) for values in measured.values()), default=0)
        cells = [_cell(result, arm, m, tests[m].get(arm))._replace(bold=best[m] == arm) for m in metrics]
        rows.append([Cell(arm), Cell(str(n)), *cells])
    return ["arm", "n", *map(_heading, metrics)], rows


def p_legend(result: Result, rows: Sequence[Sequence[Cell]], baseline: str | None = None) -> str:
    """Explains the p and stars of a table in a sentence; empty where it holds none."""
    small = [cell.small for row in rows for cell in row if cell.small]
    if not small:
        return ""
    baseline = words.baseline_of(result) if baseline is None else baseline
    text = f"p: Welch's test against {baseline}, with Holm's correction for the arms of a column"
    starred = any(cell.endswith("*") for cell in small)
    return text + ("; * p < .05, ** p < .01, *** p < .001." if starred else ".")


def _heading(name: str) -> str:
    metric = words.metric_of(name)
    arrow = "" if metric.higher is None else " ↑" if metric.higher else " ↓"
    return words.axis_title(metric) + arrow


def _cell(result: Result, arm: str, name: str, p: float | None) -> Cell:
    if name not in result["arms"][arm]:
        return Cell("\N{EN DASH}")
    metric, decimals = words.metric_of(name), words.decimals_of(result, name)
    values = metric.scale * np.asarray(result["arms"][arm][name], np.float64)
    mean, sd, n = significance.summarise(values.tolist())
    decimals = words.places(mean) if decimals is None else decimals
    text = words.number(mean, decimals)
    if n > 1 and (decimals or np.ptp(values) > 0):
        text += f" ± {words.number(sd, decimals)}"
    return Cell(text, "" if p is None else f"{words.p_text(p)} {words.stars(p)}".rstrip())


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.bold else cell.text
    return f"{text} ({cell.small})" if cell.small else text


def _markdown_escape(text: str) -> str:
    """Keeps a name from ending its cell or starting a tag."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("|", "&#124;")).split())
