"""Tables inside Markdown documents, kept equal to the result files they come from.

A document marks a place with ``<!-- results: NAME -->`` or ``<!-- results: NAME accuracy,loss -->`` and
``<!-- end -->``; what stands between the two is written by :func:`fill_tables`. ``<!-- results: NAME flatness -->`` is
the place of the table of flatness.

A table with one row per study names its metric and, line by line, what to call a study and which arm of which result to
compare with that result's baseline::

    <!-- summary: accuracy
    Digits, 100 labels: quickstart/kd
    -->
    <!-- end -->
"""

import re
from collections.abc import Callable, Sequence

from kdjax.report import tables, text
from kdjax.report.text import Result

FOLDER = "experiments/results"
_SUMMARY = re.compile(r"(<!-- summary: (\S+)\n(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)
_PLACE = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, read: Callable[[str], Result], *, folder: str = FOLDER) -> str:
    """Writes every marked table of a document anew.

    Args:
      text: of the document.
      read: the name of a result, such as ``benchmarks/layers``, to its content.
      folder: of the result files, relative to the document.

    Returns:
      The text with each mark followed by what was found, the ratios or the table, and where the numbers come from.
    """

    def place(match: re.Match[str]) -> str:
        begin, name, metrics, end = match.groups()
        wanted = metrics.split(",") if metrics else None
        return f"{begin}{section(read(name), name=name, metrics=wanted, folder=folder)}{end}"

    def place_summary(match: re.Match[str]) -> str:
        begin, metric, rows, end = match.groups()
        return f"{begin}\n{summary(rows.splitlines(), read, metric=metric, folder=folder)}\n{end}"

    return _SUMMARY.sub(place_summary, _PLACE.sub(place, text))


def summary(rows: Sequence[str], read: Callable[[str], Result], *, metric: str, folder: str = FOLDER) -> str:
    """One arm of each of several results beside its baseline, as Markdown.

    Args:
      rows: as ``title: result/arm``.
      read: as in :func:`fill_tables`.
      metric: the column.
      folder: as in :func:`fill_tables`.
    """
    title = text.axis_title(text.metric_of(metric))
    lines = [f"| study | arm | n | baseline {title} | {title} | p |", "| :-- | :-- | --: | --: | --: | --: |"]
    for row in rows:
        study, _, place = row.rpartition(": ")
        name, _, arm = place.rpartition("/")
        result = read(name)
        baseline = text.baseline_of(result)
        cells = {row[0].text: row[1:] for row in tables.table(result, [metric])[1]}
        (n, value), (_, base) = cells[arm], cells[baseline or ""]
        link = f"[{study}]({folder}/{name}.json)"
        lines.append(f"| {link} | {arm} | {n.text} | {base.text} | {value.text} | {value.small} |")
    return "\n".join(lines) + "\n"


def section(result: Result, *, name: str, metrics: list[str] | None, folder: str = FOLDER) -> str:
    """One result as Markdown: the finding, its table, and the line that says how it came about."""
    if metrics == ["flatness"]:
        return f"\n{tables.markdown_flatness(result)}\n{provenance(result, name=name, folder=folder)}\n"
    ratios = result.get("ratios", {})
    # Means alone, and many ratios, are said better by their table.
    in_words = len(ratios) <= text.RATIOS_IN_WORDS if ratios else bool(result.get("comparisons"))
    parts = [text.finding(result)] if in_words else []
    if ratios:
        parts.append(ratio_table(result))
    if metrics or not ratios:
        parts.append(tables.markdown_table(result, metrics=metrics).rstrip())
        legend = tables.p_legend(result, tables.table(result, metrics)[1])
        parts += [f"<sub>{legend}</sub>"] if legend else []
    return "\n\n".join(["", *parts, provenance(result, name=name, folder=folder)])[1:] + "\n"


def ratio_table(result: Result) -> str:
    """Peers by how many times faster or smaller kdjax is."""
    lines = ["| compared with | times | low | high |", "| :-- | --: | --: | --: |"]
    for peer, ratio in result["ratios"].items():
        values = " | ".join(f"{ratio[k]:#.3g}" for k in ("median", "low", "high"))
        lines.append(f"| {peer} | {values} |")
    return "\n".join(lines)


def provenance(result: Result, *, name: str, folder: str = FOLDER) -> str:
    """Command, n, what was scaled down, machine and commit, in one line of small print."""
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
        f"commit {result['commit'][:8]}{dirty}; "
        f"[{name}.json]({folder}/{name}.json)</sub>"
    )
