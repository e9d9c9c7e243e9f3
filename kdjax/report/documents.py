"""Tables in Markdown documents, kept equal to the result files.

A document marks the place of a table with ``<!-- results: NAME -->`` or ``<!-- results: NAME accuracy,loss -->``, and
its end with ``<!-- end -->``. :func:`fill_tables` writes what stands between. ``<!-- results: NAME flatness -->`` marks
the table of flatness.

A table with one row per study names its metric and, line by line, what to call a study and which arm of which result to
compare with that result's baseline::

    <!-- summary: accuracy
    Digits, 100 labels: quickstart/kd
    -->
    <!-- end -->
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdjax import results
from kdjax.report import tables, text
from kdjax.report.text import Result

_PLACE = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_SUMMARY = re.compile(r"(<!-- summary: (\S+)\n(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(document: str | os.PathLike[str], folder: str | os.PathLike[str]) -> str:
    """The text of a Markdown document with every marked table written from its result file.

    Args:
      document: path of the document; it is not changed.
      folder: of the result files. The mark ``benchmarks/layers`` stands for ``benchmarks/layers.json`` in it.

    Returns:
      The text. After each mark come the finding, the ratios or the table, and how the numbers were made, with a link.

    Raises:
      ValueError: if a result file is damaged or has no such metric.
      FileNotFoundError: if there is no such result file.
    """
    folder, document = Path(folder), Path(document)
    link = Path(os.path.relpath(folder, document.parent)).as_posix()

    def place(match: re.Match[str]) -> str:
        begin, name, metrics, end = match.groups()
        result = results.read(folder / f"{name}.json")
        return begin + _section(result, f"[{name}.json]({link}/{name}.json)", metrics) + end

    def place_summary(match: re.Match[str]) -> str:
        begin, metric, rows, end = match.groups()
        return f"{begin}\n{_summary(rows.splitlines(), metric, folder, link)}\n\n{end}"

    return _SUMMARY.sub(place_summary, _PLACE.sub(place, document.read_text(encoding="utf-8")))


def _summary(rows: Sequence[str], metric: str, folder: Path, link: str) -> str:
    """One arm of each of several results beside its baseline; a row is written ``title: result/arm``."""
    title = text.axis_title(text.metric_of(metric))
    lines = [f"| study | arm | n | baseline {title} | {title} | p |", "| :-- | :-- | --: | --: | --: | --: |"]
    for row in rows:
        study, _, place = row.rpartition(": ")
        name, _, arm = place.rpartition("/")
        result = results.read(folder / f"{name}.json")
        cells = {cell.text: rest for cell, *rest in tables.table(result, [metric])[1]}
        (n, value), (_, base) = cells[arm], cells[text.baseline_of(result) or ""]
        lines.append(
            f"| [{study}]({link}/{name}.json) | {arm} | {n.text} | {base.text} | {value.text} | {value.small} |"
        )
    return "\n".join(lines)


def _section(result: Result, link: str, metrics: str | None) -> str:
    """One result as Markdown: the finding, its table, and how the numbers were made."""
    if metrics == "flatness":
        return f"\n{tables.markdown_flatness(result)}\n{_provenance(result, link)}\n"
    ratios, columns = result.get("ratios", {}), metrics.split(",") if metrics else None
    # A table alone is clearer than a sentence of many ratios or of means without a test.
    in_words = len(ratios) <= text.RATIOS_IN_WORDS if ratios else bool(result.get("comparisons"))
    parts = [text.finding(result)] if in_words else []
    if ratios:
        printed = [(peer, *(f"{r[k]:#.3g}" for k in ("median", "low", "high"))) for peer, r in ratios.items()]
        rows = [list(map(tables.Cell, row)) for row in printed]
        parts.append(tables.markdown(["compared with", "times", "low", "high"], rows).rstrip())
    if columns or not ratios:
        parts.append(tables.markdown_table(result, metrics=columns).rstrip())
        legend = tables.legend(result, tables.table(result, columns)[1])
        parts += [f"<sub>{legend}</sub>"] if legend else []
    return "\n" + "\n\n".join([*parts, _provenance(result, link)]) + "\n"


def _provenance(result: Result, link: str) -> str:
    """Command, n, what was scaled down, machine, commit and file, in one line of small print."""
    machine, n = result["hardware"], len(result["seeds"])
    where = (
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'} of {machine['cpu']}"
        if machine["backend"] == "cpu"
        else machine["device"]
    )
    scaled = f"; {result['scaled_down']}" if result["scaled_down"] else ""
    dirty = " with uncommitted changes" if result["dirty"] else ""
    return (
        f"<sub>`{result['command']}`; n = {n}{scaled}; {where}, jax {result['versions'].get('jax', 'unknown')}; "
        f"commit {result['commit'][:8]}{dirty}; {link}</sub>"
    )
