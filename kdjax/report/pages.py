"""One HTML page that needs no other file: finding, question, table, figures, and how the numbers were made."""

import base64
import html
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdjax import files
from kdjax.report import comparisons, figures, tables, text
from kdjax.report.comparisons import Result
from kdjax.report.figures.style import Panel, colours_of, svg
from kdjax.report.tables import Cell

_UNFOLDED = 5  # a list of more sentences is folded


def page(
    results: Mapping[str, Result],
    *,
    path: str | os.PathLike[str],
    title: str | None = None,
    problems: Sequence[str] = (),
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes one HTML file with the text, tables and figures of one result or of several.

    Args:
      results: heading → result, as read by :func:`kdjax.results.read`.
      path: of the file.
      title: of the page; the heading of a single result when None.
      problems: sentences about results that could not be read.
      progress: called after each result with how many are done; one with many figures takes seconds.
    """
    several = len(results) > 1
    title = title or ("kdjax results" if several else next(iter(results), "kdjax results"))
    body = [f"<h1>{_esc(title)}</h1>"]
    if problems:
        items = "".join(f"<li>{_esc(problem)}</li>" for problem in problems)
        body.append(f'<section class="problems"><h2>Not in this report</h2><ul>{items}</ul></section>')
    if several:
        links = [
            f'<li><a href="#r{i}">{_esc(name)}</a>: {_esc(text.finding(result))}</li>'
            for i, (name, result) in enumerate(results.items())
        ]
        body.append(f"<nav><ol>{''.join(links)}</ol></nav>")
    for i, (name, result) in enumerate(results.items()):
        body.append(f'<section id="r{i}">{_section(name if several else "", result)}</section>')
        progress(i + 1)
    files.write_text(path, _PAGE.format(title=_esc(title), style=_CSS, body="\n".join(body)))


def _section(heading: str, result: Result) -> str:
    tested = comparisons.family(result)[0 if result.get("ratios") else 1 :]
    others = [text.comparison_sentence(result, comparison) for comparison in tested]
    scaled = f"<p><b>Scaled down:</b> {_esc(result['scaled_down'])}</p>" if result["scaled_down"] else ""
    drawn = "".join(map(_figure, figures.panels(result)))
    parts = [
        f"<h2>{_esc(heading)}</h2>" if heading else "",
        f'<p class="finding">{_esc(text.finding(result))}</p>',
        f'<p class="question">{_esc(result["question"])}</p>',
        _results(result) if result["arms"] else "",
        _list("Further comparisons", others),
        f'<div class="figures">{drawn}</div>' if drawn else "",
        _flatness(result) if result.get("flatness") else "",
        _list("Notes", result.get("notes", [])),
        scaled,
        _provenance(result),
    ]
    return "\n".join(filter(None, parts))


def _figure(panel: Panel) -> str:
    """The figure as an image inside the page, its caption, and its numbers, folded."""
    data = base64.b64encode(svg(panel)).decode()
    image = f'<img alt="{html.escape(panel.alt)}" src="data:image/svg+xml;base64,{data}">'
    folded = ""
    if panel.table is not None:
        title, head, rows = panel.table
        numbers = _table(title, head, [[Cell(cell) for cell in row] for row in rows])
        folded = f"<details><summary>{_esc(title)}</summary>{numbers}</details>"
    return f"<figure>{image}<figcaption>{_esc(panel.caption)}</figcaption>{folded}</figure>"


def _list(heading: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{_esc(sentence)}</li>" for sentence in sentences)
    if len(sentences) > _UNFOLDED:
        return f"<details><summary>{heading} ({len(sentences)})</summary><ul>{items}</ul></details>"
    return f"<h3>{heading}</h3><ul>{items}</ul>" if items else ""


def _results(result: Result) -> str:
    head, rows = tables.table(result)
    table = _table("Table of results", head, rows, colours_of(result))
    return f'{table}<p class="legend">{_esc(_legend(result, rows))}</p>'


def _flatness(result: Result) -> str:
    head, rows = tables.flatness_table(result)
    table = _table("Table of flatness", head, rows, colours_of(result))
    legend = _esc(tables.flatness_legend(result, rows))
    return f'<h3>Flatness at the final weights</h3>{table}<p class="legend">{legend}</p>'


def _table(
    label: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], colours: Mapping[str, str] | None = None
) -> str:
    """A table that scrolls; with ``colours`` a dot before the name of each row shows its colour in the figures."""
    lines = []
    for name, *cells in rows:
        dot = f'<i style="background:{colours[name.text]}"></i>' if colours else ""
        line = f'<th scope="row">{dot}{_breakable(name.text)}</th>'
        for cell in cells:
            printed = f"<b>{_esc(cell.text)}</b>" if cell.bold else _esc(cell.text)
            line += f"<td>{printed}{f'<small>{_esc(cell.small)}</small>' if cell.small else ''}</td>"
        lines.append(f"<tr>{line}</tr>")
    titles = "".join(f'<th scope="col">{_breakable(title)}</th>' for title in head)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_esc(label)}">{table}</div>'


def _legend(result: Result, rows: Sequence[Sequence[Cell]]) -> str:
    """Explains only the signs that the table holds."""
    cells = [cell for row in rows for cell in row]
    references = [
        arm for arm in result["arms"] if comparisons.is_reference(arm) and any(cell.p for cell in cells)
    ]
    sentences = [
        "Mean ± standard deviation over n runs." if any("±" in cell.text for cell in cells) else "",
        "↑ more is better, ↓ less is better.",
        tables.legend(result, rows),
        *(f"The arm {arm} is a reference and is not tested." for arm in references),
    ]
    return " ".join(filter(None, sentences))


def _provenance(result: Result) -> str:
    """How the numbers were made, folded."""
    commit = result["commit"][:12] + (", with uncommitted changes" if result["dirty"] else "")
    minutes, seconds = divmod(round(result["wall_clock_s"]), 60)
    duration = f"{minutes} min {seconds} s" if minutes else f"{result['wall_clock_s']:g} s"
    flags = (f"<code>--{_esc(str(k))}={_esc(str(v))}</code>" for k, v in result["flags"].items())
    said = {
        "Declared before the first run": [_declared(plan) for plan in result.get("plan", ())[:1]],
        "Changed since": [_declared(plan) for plan in result.get("plan", ())[1:]],
        "Supersedes": [f"{one['result']}: {one['why']}" for one in result.get("supersedes", ())],
    }
    pairs = {
        "Command": f"<code>{_esc(result['command'])}</code>",
        "Made": _esc(f"{result['created']}, in {duration}"),
        "Commit": f"<code>{_esc(commit)}</code>",
        "Seeds": _esc(", ".join(map(str, result["seeds"]))),
        "Runs and images": _esc(text.counts(result)),
        **{name: "<br>".join(map(_esc, lines)) for name, lines in said.items() if lines},
        "Hardware": _esc(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["hardware"].items())),
        "Versions": _esc(", ".join(f"{k} {v}" for k, v in result["versions"].items())),
        "Flags": "<br>".join(flags),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{content}</dd>" for name, content in pairs.items())
    return f"<details><summary>How this was made</summary><dl>{listed}</dl></details>"


def _declared(plan: Mapping[str, Any]) -> str:
    """What a study wrote down, and when, in a sentence."""
    pairs = ", ".join(f"{a} with {b}" for a, b in plan["primary"])
    margin = f"; equal within {plan['margin']:g}" if plan["margin"] else ""
    chosen = f"; chosen before: {plan['chosen_on']}" if plan["chosen_on"] else ""
    return f"{plan['declared'][:16]}: {plan['metric']} of {pairs or 'no pair'}{margin}{chosen}"


def _esc(words: str) -> str:
    """Escapes text, and keeps a number and its percent sign, or p and its value, on one line."""
    return html.escape(_TIED.sub("\N{NO-BREAK SPACE}", words))


def _breakable(name: str) -> str:
    """Escapes a name, which may break after an underscore."""
    return _esc(name).replace("_", "_<wbr>")


# Spaces in "95 %", "accuracy ↑", "p = .02 *", "n = 5 + 5".
_TIED = re.compile(
    r" (?=[%↑↓])|(?<=\b[pn]) (?=[=<>] )|(?<=\b[pn] [=<>]) | (?=\*+$)|(?<=\*) |(?<=\d) (?=\+ \d)|(?<=\d \+) "
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """*{box-sizing:border-box}
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1d1d20;--muted:#66666e;--link:#1f63ad;--grid:#dfdfe1}
@media(prefers-color-scheme:dark){:root{--paper:#161618;--ink:#e9e9ec;--muted:#a0a0a8;--link:#73b0f4;--grid:#38383c}}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,sans-serif}
main{max-width:58rem;margin:0 auto;padding:clamp(1rem,5vw,3rem)}
h1{font-size:1rem;margin:0 0 1.5rem;color:var(--muted)}
h2{font-size:1.15rem}
h3{font-size:1rem;margin:2rem 0 .5rem}
.finding{font:clamp(1.3rem,1rem + 1.6vw,1.8rem)/1.35 Georgia,serif;margin:0 0 1rem;max-width:36em}
.question{color:var(--muted);margin:0 0 2rem;max-width:40em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.95rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem 0 .5rem 1.5rem;text-align:right;vertical-align:top;white-space:nowrap;font-weight:400}
thead th{white-space:normal;line-height:1.3;color:var(--muted);font-size:.85rem;vertical-align:bottom;
 border-bottom:1px solid var(--muted)}
th:first-child{padding-left:0;text-align:left;position:sticky;left:0;background:var(--paper)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
tbody i{display:inline-block;width:.6em;height:.6em;border-radius:50%;margin-right:.55em}
small{display:block;font-size:.8rem;color:var(--muted)}
.legend,figcaption{font-size:.85rem;color:var(--muted);margin:.6rem 0 0;line-height:1.45}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,23rem),1fr));gap:2rem 2.5rem;
 margin:2.5rem 0;align-items:start}
figure{margin:0;max-width:32rem;min-width:0}
figure td,figure th{padding:.25rem 0 .25rem .9rem;font-size:.8rem}
img{display:block;width:100%;height:auto;border-radius:4px}
section+section{margin-top:3.5rem;padding-top:2.5rem;border-top:1px solid var(--grid)}
ol,ul{padding-left:1.25rem}
li{margin:.35rem 0;overflow-wrap:anywhere}
a{color:var(--link)}
.problems{border-left:3px solid var(--link);padding-left:1rem;margin:0 0 2.5rem}
details{margin-top:1rem;font-size:.9rem}
summary,dt{cursor:default;color:var(--muted)}
dd{margin:0 0 .5rem;overflow-wrap:anywhere}
code{font:.9em/1.5 ui-monospace,monospace}
@media(max-width:34rem){th,td{padding-left:1.1rem}
 tbody th{white-space:normal;min-width:7.5rem;overflow-wrap:anywhere}}"""
