"""Tables and figures in Markdown documents, kept equal to the result files.

A document marks the place of a table with ``<!-- results: NAME -->`` or ``<!-- results: NAME accuracy,loss -->``, and
its end with ``<!-- end -->``. :func:`fill_tables` writes what stands between. ``<!-- results: NAME flatness -->`` marks
the table of flatness.

A figure in a sentence is marked in the line, with the name of the result, the metric and an arm, or a difference of two
arms; or with ``times`` and a ratio of a benchmark. A fourth field prints a part alone: ``size``, ``interval``, ``p`` or
``corrected p``, after Holm's correction for the comparisons that the result is about::

    KD gains <!-- value: quickstart | accuracy | kd - scratch -->+8.3 points (95 % ...)<!-- end -->.
    PyTorch takes <!-- value: benchmarks/layers | times | resnet8 step: torch -->1.07× (0.76× to 1.08×)<!-- end -->.

A table with one row per study names its metric and, line by line, what to call a study and which arm of which result to
compare with that result's baseline::

    <!-- summary: accuracy
    Digits, 100 labels: quickstart/kd
    -->
    <!-- end -->
"""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdjax import results
from kdjax.report import comparisons, tables, text
from kdjax.report.comparisons import Result

_PLACE = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_VALUE = re.compile(r"(<!-- value: (.+?) -->).*?(<!-- end -->)", re.DOTALL)
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
    read = functools.cache(
        lambda name: results.read(folder / f"{name}.json")
    )  # a page may hold many figures of one

    def place(match: re.Match[str]) -> str:
        begin, name, metrics, end = match.groups()
        return begin + _section(read(name), f"[{name}.json]({link}/{name}.json)", metrics) + end

    def place_summary(match: re.Match[str]) -> str:
        begin, metric, rows, end = match.groups()
        return f"{begin}\n{_summary(rows.splitlines(), metric, folder, link)}\n\n{end}"

    def place_value(match: re.Match[str]) -> str:
        begin, fields, end = match.groups()
        name, *which = (field.strip() for field in fields.split("|"))
        return begin + value(read(name), *which) + end

    filled = document.read_text(encoding="utf-8")
    for pattern, written in ((_PLACE, place), (_SUMMARY, place_summary), (_VALUE, place_value)):
        filled = pattern.sub(written, filled)
    return filled


def count_places(text: str) -> str:
    """How many tables and figures of results a document has, in words; empty if none."""
    counts = {
        "table": len([*_PLACE.finditer(text), *_SUMMARY.finditer(text)]),
        "figure": len(_VALUE.findall(text)),
    }
    return " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count)


def value(result: Result, metric: str, which: str, part: str = "") -> str:
    """A figure for a sentence: what the table says of an arm, a difference of two arms, or a ratio, with its interval.

    Args:
      result: as read.
      metric: of the arms; ``times`` for a ratio of a benchmark.
      which: an arm, two of them as "a - b", or the name of a ratio.
      part: if not all: ``size`` or ``interval``; of a difference also ``p``, which like the interval is not corrected
        for other comparisons, or ``corrected p``.

    Raises:
      ValueError: if the result has no such arm, metric, ratio or comparison, or too few runs for a test.
    """
    a, _, b = which.partition(" - ")
    if metric == "times":
        parts = _parts_of_ratio(result, which)
    elif b:
        parts = _parts_of_difference(result, metric, a, b, part)
    else:
        _check_arm(result, metric, a)
        cell = tables.cell(result, a, metric)
        parts = {"": cell.text + f" ({cell.note})" * bool(cell.note)}
    if part not in parts:
        raise ValueError(
            f"{result['name']} has no {part!r} of {metric} {which!r}, which a document asks for; there is "
            f"{', '.join(filter(None, parts)) or 'no part of it'}."
        )
    return parts[part]


def _check_arm(result: Result, metric: str, arm: str) -> None:
    if metric not in result["arms"].get(arm, {}):
        raise ValueError(f"{result['name']} has no {metric} of an arm {arm!r}, which a document asks for.")


def _parts_of_ratio(result: Result, name: str) -> dict[str, str]:
    ratio = result.get("ratios", {}).get(name)
    if ratio is None:
        raise ValueError(f"{result['name']} has no ratio {name!r}, which a document asks for.")
    size, low, high = (text.times(ratio[k]) for k in ("median", "low", "high"))
    return {"": f"{size} ({low} to {high})", "size": size, "interval": f"{low} to {high}"}


def _parts_of_difference(result: Result, metric: str, a: str, b: str, part: str) -> dict[str, str]:
    for arm in (a, b):
        _check_arm(result, metric, arm)
    times = metric.startswith(
        comparisons.TIMES
    )  # compared by rank: there is no mean of those that never came
    found = None if times else comparisons.compare(result, metric, a, b)
    p = comparisons.p_of(result, metric, a, b) if times else found and found.p
    if p is None:
        raise ValueError(
            f"{result['name']} has too few runs of {a} and {b} for a test, which a document asks for."
        )
    parts = {"p": text.p_text(p)}
    if part == "corrected p":  # which tests every pair of the family
        corrected = comparisons.corrected(result, metric).get((a, b))
        parts |= {} if corrected is None else {part: text.p_text(corrected)}
    if found is None:
        return parts
    comparison = {"metric": metric, "a": a, "b": b, **found._asdict()}
    size, _, rest = text.difference_text(result, comparison, tested=False).partition(" (95 % interval ")
    interval = rest.rstrip(")")
    return {"": f"{size} ({interval})", "size": size, "interval": interval, **parts}


def _summary(rows: Sequence[str], metric: str, folder: Path, link: str) -> str:
    """One arm of each of several results beside its baseline; a row is written ``title: result/arm``."""
    title = text.axis_title(text.metric_of(metric))
    lines = [f"| study | arm | n | baseline {title} | {title} | p |", "| :-- | :-- | --: | --: | --: | --: |"]
    for row in rows:
        study, _, place = row.rpartition(": ")
        name, _, arm = place.rpartition("/")
        result = results.read(folder / f"{name}.json")
        cells = {cell.text: rest for cell, *rest in tables.table(result, [metric])[1]}
        (n, value), (_, base) = cells[arm], cells[comparisons.baseline_of(result) or ""]
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
    tested = {one["metric"] for one in result.get("comparisons", ())}
    shown = bool(tested) if columns is None else bool(tested & set(columns))
    in_words = len(ratios) <= text.RATIOS_IN_WORDS if ratios else shown
    parts = [text.finding(result)] if in_words else []
    if ratios:
        printed = [(peer, *(f"{r[k]:#.3g}" for k in ("median", "low", "high"))) for peer, r in ratios.items()]
        rows = [list(map(tables.Cell, row)) for row in printed]
        parts.append(tables.markdown(["compared with", "times", "low", "high"], rows).rstrip())
    if columns or not ratios:
        head, rows = tables.table(result, columns)
        parts.append(tables.markdown(head, rows).rstrip())
        legend = tables.legend(result, rows)
        parts += [f"<sub>{legend}</sub>"] if legend else []
        parts += ["\n".join(f"- {sentence}" for sentence in _between(result))] if in_words else []
    return "\n" + "\n\n".join(filter(None, [*parts, _provenance(result, link)])) + "\n"


def _between(result: Result) -> list[str]:
    """The comparisons of arms with another than the baseline, which stand in no cell of the table."""
    baseline, others = comparisons.baseline_of(result), comparisons.family(result)[1:]
    return [text.comparison_sentence(result, one) for one in others if baseline not in (one["a"], one["b"])]


def _provenance(result: Result, link: str) -> str:
    """Command, n, what was scaled down, machine, commit and file, in one line of small print."""
    machine = result["hardware"]
    where = (
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'} of {machine['cpu']}"
        if machine["backend"] == "cpu"
        else machine["device"]
    )
    scaled = f"; {result['scaled_down']}" if result["scaled_down"] else ""
    dirty = " with uncommitted changes" if result["dirty"] else ""
    folder = link.partition("(")[2].rpartition("/")[0]
    history = "".join(
        f"; supersedes [{one['result']}]({folder}/{one['result']}): {one['why']}"
        for one in result.get("supersedes", ())
    )
    return (
        f"<sub>`{result['command']}`; {text.counts(result)}{scaled}; {where}, jax "
        f"{result['versions'].get('jax', 'unknown')}; commit {result['commit'][:8]}{dirty}; {link}{history}</sub>"
    )
