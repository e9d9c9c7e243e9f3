"""Tables inside Markdown documents, kept equal to the result files they come from.

A document marks a place with ``<!-- results: NAME -->`` or ``<!-- results: NAME accuracy,loss -->`` and
``<!-- end -->``; what stands between the two is written by :func:`fill_tables`. ``<!-- results: NAME flatness -->`` is
the place of the table of flatness.
"""

import re
from collections.abc import Callable

from kdjax.report import tables, text
from kdjax.report.text import Result

_PLACE = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, read: Callable[[str], Result]) -> str:
    """Writes every marked table of a document anew.

    Args:
      text: of the document.
      read: the name of a result, such as ``benchmarks/layers``, to its content.

    Returns:
      The text with each mark followed by what was found, the ratios or the table, and where the numbers come from.
    """

    def place(match: re.Match[str]) -> str:
        begin, name, metrics, end = match.groups()
        return (
            f"{begin}{section(read(name), name=name, metrics=metrics.split(',') if metrics else None)}{end}"
        )

    return _PLACE.sub(place, text)


def section(result: Result, *, name: str, metrics: list[str] | None) -> str:
    """One result as Markdown: the finding, its table, and the line that says how it came about."""
    if metrics == ["flatness"]:
        return f"\n{tables.markdown_flatness(result)}\n{provenance(result, name=name)}\n"
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
    return "\n\n".join(["", *parts, provenance(result, name=name)])[1:] + "\n"


def ratio_table(result: Result) -> str:
    """Peers by how many times faster or smaller kdjax is."""
    lines = ["| compared with | times | low | high |", "| :-- | --: | --: | --: |"]
    for peer, ratio in result["ratios"].items():
        values = " | ".join(f"{ratio[k]:#.3g}" for k in ("median", "low", "high"))
        lines.append(f"| {peer} | {values} |")
    return "\n".join(lines)


def provenance(result: Result, *, name: str) -> str:
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
        f"[{name}.json](experiments/results/{name}.json)</sub>"
    )
