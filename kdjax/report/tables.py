"""The tables of a result: arms by metrics and arms by measures of flatness, as cells and as Markdown."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax import significance
from kdjax.report import comparisons, text
from kdjax.report.comparisons import Result

# Measures of flatness and their column titles, in order.
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
    """A printed value, a note and a p-value that stand beside it in small type, and whether it is bold."""

    text: str
    note: str = ""
    p: str = ""
    bold: bool = False

    @property
    def small(self) -> str:
        """What stands in small type."""
        return "; ".join(filter(None, (self.note, self.p)))


def markdown_table(result: Result, *, metrics: Sequence[str] | None = None) -> str:
    """Arms by metrics as a Markdown table: mean ± sd over n seeds, and p against the baseline.

    The baseline is the arm that most of the result's comparisons are with, or the first arm that is no teacher. Arms
    are compared by seed, in accuracy also by test example where the result holds the answers; Holm's method corrects
    the p of a column for all comparisons of the result; :func:`legend` explains the stars. Fractions are printed as
    percent. The best mean of a column is bold if tests tell it from every other arm, after Holm's correction. Teachers
    are listed, but neither tested nor bold. An arm that has none of the metrics is left out.

    A ``steps_to_X`` or ``paid_to_X`` is told by its median, with how many runs reached the target (``reached_X``), and
    tested by ranks, in which those that never did are the last: "141 (9 of 10 reached)".

    Args:
      result: as read by :func:`kdjax.results.read`.
      metrics: columns in this order; all metrics of the arms when None.

    Raises:
      ValueError: if the result has no such metric.
    """
    return markdown(*table(result, metrics))


def markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Headings and rows of cells as a Markdown table."""
    lines = [[*head], [":--"] + ["--:"] * (len(head) - 1)]
    lines += [[_markdown_cell(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(_markdown_escape(c) for c in line) + " |" for line in lines) + "\n"


def table(result: Result, metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of cells of the table that :func:`markdown_table` describes."""
    known = comparisons.measured(result)
    metrics = known if metrics is None else list(metrics)
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"{result['name']} has no metric {metric!r}; write one of {', '.join(known)}.")
    tests = {metric: comparisons.adjusted_p(result, metric) for metric in metrics}
    best = {
        metric: comparisons.best_arm(
            result, metric, higher=text.metric_of(metric).higher, against_baseline=tests[metric]
        )
        for metric in metrics
    }
    rows = []
    for arm, measured in result["arms"].items():
        if not measured.keys() & set(metrics):
            continue
        n = max((len(values) for values in measured.values()), default=0)
        cells = [cell(result, arm, m, tests[m].get(arm))._replace(bold=best[m] == arm) for m in metrics]
        rows.append([Cell(arm), Cell(str(n)), *cells])
    return ["arm", "n", *map(_heading, metrics)], rows


def cell(result: Result, arm: str, name: str, p: float | None = None) -> Cell:
    """What a table says of an arm on a metric, with its p."""
    measured = result["arms"][arm]
    if name not in measured:
        return Cell("\N{EN DASH}")
    tested = "" if p is None else f"{text.p_text(p)} {text.stars(p)}".rstrip()
    if name.startswith(comparisons.TIMES):
        found = significance.median_time(*comparisons.censored(measured, name))
        end = "> " + text.number(max(measured[name]), None)
        note = "" if found.reached == found.n else f"{found.reached} of {found.n} reached"
        return Cell(text.number(found.median, None) if np.isfinite(found.median) else end, note, tested)
    return Cell(text.mean_sd(measured[name], text.metric_of(name), text.decimals_of(result, name)), p=tested)


def markdown_flatness(result: Result) -> str:
    """Arms by measures of flatness as a Markdown table like :func:`markdown_table`, and what they mean."""
    head, rows = flatness_table(result)
    return f"{markdown(head, rows)}\n<sub>{flatness_legend(result, rows)}</sub>\n"


def flatness_table(result: Result) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of cells: the loss first, then each measure raw and filter-normalised, side by side."""
    arms = {
        arm: {title: measures[name] for name, title in _FLATNESS.items() if name in measures}
        for arm, measures in result["flatness"].items()
    }
    return table({**result, "arms": arms})


def legend(result: Result, rows: Sequence[Sequence[Cell]]) -> str:
    """Explains the p, stars, medians and bold numbers of a table, and what a single teacher cannot show."""
    cells, arms, sentences = [cell for row in rows for cell in row], result["arms"], []
    if any(name.startswith(comparisons.TIMES) for measured in arms.values() for name in measured):
        sentences += [
            "Steps and payments to a target are medians; the test ranks runs, those that never reached it last."
        ]
    if any(cell.p for cell in cells):
        starred = "; * p < .05, ** p < .01, *** p < .001" * any(cell.p.endswith("*") for cell in cells)
        count, baseline = comparisons.family_size(result), comparisons.baseline_of(result)
        of = f"Holm's correction for {count} comparisons" if count > 1 else "a single comparison"
        sentences += [f"p: against {baseline}, by seed{_also(result)}, with {of}{starred}."]
    if any(cell.bold for cell in cells):
        sentences += ["Bold: the best, told from every other arm after Holm's correction."]
    teachers = [
        arm
        for arm in arms
        if comparisons.is_reference(arm) and len(arms) > 1 and comparisons.runs_of(result, arm) == 1
    ]
    if teachers and any(cell.p for cell in cells):
        sentences += ["One teacher: what holds of it may not hold of another."]
    return " ".join(sentences)


def _also(result: Result) -> str:
    return ", of accuracy also by test example" if result.get("correct") else ""


def flatness_legend(result: Result, rows: Sequence[Sequence[Cell]]) -> str:
    """What the numbers of a flatness table do and do not show."""
    exact = []
    for what, error, of in _ERRORS:
        shares = [
            100 * float(np.mean(np.abs(measures[error])) / np.mean(np.abs(measures[of])))
            for measures in result["flatness"].values()
            if error in measures and np.any(measures.get(of, 0))
        ]
        exact += [f"the {what} within {max(0.1, *shares):,.1f} %"] if shares else []
    sentences = (
        "All on the same images. Curvature shrinks with the loss by itself (Granziol, Flatness is a False Friend, "
        "2020), so compare only arms whose loss is about equal.",
        "Raw numbers change when one layer is multiplied by a factor and the next divided by it, although the network "
        "stays the same (Dinh et al., 2017); filter-normalised ones do not.",
        "Sharpness: the largest increase of the loss found within a radius.",
        f"Measured are {text.listing(exact)}." if exact else "",
        legend({**result, "arms": result["flatness"]}, rows),
    )
    return " ".join(filter(None, sentences))


def _heading(name: str) -> str:
    metric = text.metric_of(name)
    arrow = "" if metric.higher is None else " ↑" if metric.higher else " ↓"
    return text.axis_title(metric) + arrow


def _markdown_cell(cell: Cell) -> str:
    printed = f"**{cell.text}**" if cell.bold else cell.text
    return f"{printed} ({cell.small})" if cell.small else printed


def _markdown_escape(name: str) -> str:
    """Keeps a name from ending its cell or starting a tag."""
    return " ".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", name.replace("|", "&#124;")).split())
