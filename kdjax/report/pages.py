"""One HTML page that needs nothing else: finding, question, table, figures, and how they were made."""

import html
import os
import re
from collections.abc import Callable, Mapping, Sequence

from kdjax import files
from kdjax.report import figures, style, tables, text
from kdjax.report.style import Folded, Panel
from kdjax.report.text import Result

# The colours of style.LIGHT for a reader who prefers a dark page.
DARK = {
    "paper": "#161618",
    "ink": "#e9e9ec",
    "muted": "#a0a0a8",
    "grid": "#38383c",
    "s0": "#f0935c",
    "s1": "#73b0f4",
    "s2": "#5fc795",
    "s3": "#c29bea",
    "s4": "#d9b13d",
    "s5": "#ee88b8",
    "s6": "#58c4cf",
}

_UNFOLDED = 5  # sentences up to which a list stands open


def page(
    shown: Result | Sequence[Result],
    *,
    path: str | os.PathLike[str],
    title: str | None = None,
    names: Sequence[str] = (),
    problems: Sequence[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes one HTML file that needs nothing else: text, tables and figures of one result or of several.

    Args:
      shown: a result as read by :func:`kdjax.results.read`, or a list of them.
      path: of the file; it is replaced whole or not at all.
      title: of the page; the name of a single result when None.
      names: headings of several results, which may have been made by the same experiment; its name when empty.
      problems: sentences about results that could not be read, from :func:`load`.
      progress: called after each result with how many are drawn; one takes seconds if it has many figures.
    """
    found = [shown] if isinstance(shown, Mapping) else list(shown)
    title = title or (str(found[0]["name"]) if len(found) == 1 else "kdjax results")
    names = names or [str(result["name"]) for result in found]
    body = [f"<h1>{_esc(title)}</h1>"]
    if problems:
        items = "".join(f"<li>{_esc(problem)}</li>" for problem in problems)
        body.append(f'<section class="problems"><h2>Not in this report</h2><ul>{items}</ul></section>')
    if len(found) > 1:
        links = [
            f'<li><a href="#r{i}">{_esc(name)}</a>: {_esc(text.finding(result))}</li>'
            for i, (name, result) in enumerate(zip(names, found, strict=True))
        ]
        body.append(f"<nav><ol>{''.join(links)}</ol></nav>")
    headings = names if len(found) > 1 else [""]
    for i, both in enumerate(zip(headings, found, strict=False)):
        body.append(_section(*both, key=f"r{i}"))
        progress(i + 1)
    files.write_text(path, _PAGE.format(title=_esc(title), style=_css(), body="\n".join(body)))


def _section(heading: str, result: Result, *, key: str) -> str:
    tested = text.comparisons(result)[0 if result.get("ratios") else 1 :]
    others = [text.comparison_sentence(result, comparison) for comparison in tested]
    scaled = f"<p><b>Scaled down:</b> {_esc(result['scaled_down'])}</p>" if result["scaled_down"] else ""
    drawn = [_figure(panel, f"{key}-{i}") for i, panel in enumerate(figures.panels(result))]
    parts = [
        f"<h2>{_esc(heading)}</h2>" if heading else "",
        f'<p class="finding">{_esc(text.finding(result))}</p>',
        f'<p class="question">{_esc(result["question"])}</p>',
        _results(result) if result["arms"] else "",
        _list("Further comparisons, not corrected for their number", others),
        f'<div class="figures">{"".join(drawn)}</div>' if drawn else "",
        _flatness(result) if result.get("flatness") else "",
        _list("Notes", result.get("notes", [])),
        scaled,
        _making(result),
    ]
    return f'<section id="{key}">' + "\n".join(part for part in parts if part) + "</section>"


def _figure(panel: Panel, key: str) -> str:
    caption = f"<figcaption>{_esc(panel.caption)}</figcaption>"
    return f"<figure>{style.svg(panel, key=key)}{caption}{_folded(panel.folded)}</figure>"


def _folded(folded: Folded | None) -> str:
    """The numbers of a figure, behind a line that opens them."""
    if folded is None:
        return ""
    bodies = []
    for head, rows in folded.blocks:
        lines = [_row(head, "col"), *(_row(row, "row") for row in rows)]
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    table = _scroll(f"<table>{''.join(bodies)}</table>", folded.summary)
    return f"<details><summary>{_esc(folded.summary)}</summary>{table}</details>"


def _row(cells: Sequence[str], scope: str) -> str:
    """A row whose first cell names it, or one of headings."""
    first, *others = map(_breakable, cells)
    tag = "td" if scope == "row" else 'th scope="col"'
    rest = "".join(f"<{tag}>{cell}</{tag[:2]}>" for cell in others)
    return f'<tr{" class=head" * (scope == "col")}><th scope="{scope}">{first}</th>{rest}</tr>'


def _scroll(table: str, label: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_esc(label)}">{table}</div>'


def _breakable(name: str) -> str:
    return _esc(name).replace("_", "_<wbr>")


def _list(heading: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{_esc(sentence)}</li>" for sentence in sentences)
    if len(sentences) > _UNFOLDED:
        return f"<details><summary>{heading} ({len(sentences)})</summary><ul>{items}</ul></details>"
    return f"<h3>{heading}</h3><ul>{items}</ul>" if items else ""


def _results(result: Result) -> str:
    head, rows = tables.table(result)
    return _html_table(result, head, rows, "Table of results", _legend(result, rows))


def _flatness(result: Result) -> str:
    head, rows = tables.flatness_table(result)
    legend = tables.flatness_legend(result, rows)
    return f"<h3>Flatness at the final weights</h3>{_html_table(result, head, rows, 'Table of flatness', legend)}"


def _html_table(
    result: Result, head: Sequence[str], rows: Sequence[Sequence[tables.Cell]], label: str, legend: str
) -> str:
    colours = style.colours_of(result)
    lines = []
    for name, *cells in rows:
        dot = f'<i style="background:var(--{colours[name.text]})"></i>'
        line = f'<th scope="row">{dot}{_breakable(name.text)}</th>'
        for cell in cells:
            text = f"<b>{_esc(cell.text)}</b>" if cell.bold else _esc(cell.text)
            line += f"<td>{text}{f'<small>{_esc(cell.small)}</small>' if cell.small else ''}</td>"
        lines.append(f"<tr>{line}</tr>")
    titles = "".join(f'<th scope="col">{_esc(text)}</th>' for text in head)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'{_scroll(table, label)}<p class="legend">{_esc(legend)}</p>'


def _legend(result: Result, rows: Sequence[Sequence[tables.Cell]]) -> str:
    """Explains only the signs that the table holds."""
    cells = [cell for row in rows for cell in row]
    said = ["Mean ± standard deviation over n runs." if any("±" in cell.text for cell in cells) else ""]
    said += ["↑ more is better, ↓ less is better."]
    if any(cell.small for cell in cells):
        said += [tables.p_legend(result, rows)]
        references = [arm for arm in result["arms"] if arm in text.REFERENCES]
        said += [f"The arm {arm} is a reference and is not tested." for arm in references]
    if any(cell.bold for cell in cells):
        said += ["Bold: the best, where p < .05 against the runner-up."]
    return " ".join(filter(None, said))


def _making(result: Result) -> str:
    """How the result was made, folded away."""
    commit = result["commit"][:12] + (", with uncommitted changes" if result["dirty"] else "")
    minutes, seconds = divmod(round(result["wall_clock_s"]), 60)
    duration = f"{minutes} min {seconds} s" if minutes else f"{result['wall_clock_s']:g} s"
    pairs = {
        "Command": f"<code>{_esc(result['command'])}</code>",
        "Made": _esc(f"{result['created']}, in {duration}"),
        "Commit": f"<code>{_esc(commit)}</code>",
        "Seeds": _esc(", ".join(map(str, result["seeds"]))),
        "Hardware": _esc(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["hardware"].items())),
        "Versions": _esc(", ".join(f"{k} {v}" for k, v in result["versions"].items())),
        "Flags": "<br>".join(
            f"<code>--{_esc(str(k))}={_esc(str(v))}</code>" for k, v in result["flags"].items()
        ),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in pairs.items())
    return f"<details><summary>How this was made</summary><dl>{listed}</dl></details>"


def _esc(text: str) -> str:
    """Escapes text and keeps a number with its percent sign, or p with its value, on one line."""
    return html.escape(_TIED.sub("\N{NO-BREAK SPACE}", text))


# Spaces in "95 %", "accuracy ↑", "p = .02 *", "n = 5 + 5".
_TIED = re.compile(
    r" (?=[%↑↓])|(?<=\b[pn]) (?=[=<>] )|(?<=\b[pn] [=<>]) | (?=\*+$)|(?<=\*) |(?<=\d) (?=\+ \d)|(?<=\d \+) "
)


def _css() -> str:
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (style.LIGHT, DARK)
    )
    return f":root{{color-scheme:light dark;{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_CSS}"


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
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:58rem;margin:0 auto;padding:clamp(1.25rem,5vw,3.5rem) clamp(1rem,5vw,2.5rem)}
h1{font-size:1rem;font-weight:600;margin:0 0 1.5rem;color:var(--muted)}
h2{font-size:1.15rem;margin:0 0 .75rem}
h3{font-size:1rem;margin:2rem 0 .5rem}
.finding{font:clamp(1.3rem,1rem + 1.6vw,1.8rem)/1.35 Charter,"Iowan Old Style",Georgia,"Liberation Serif",serif;
 margin:0 0 1rem;max-width:36em;text-wrap:pretty}
.question{color:var(--muted);margin:0 0 2rem;max-width:40em}
/* A shadow at the right edge, covered by the table's own end, says that there is more to scroll to. */
.scroll{overflow-x:auto;background:linear-gradient(var(--paper),var(--paper)) right/1.5rem 100% no-repeat local,
 linear-gradient(to left,var(--grid),transparent) right/.8rem 100% no-repeat scroll}
table{border-collapse:collapse;min-width:min(100%,32rem);font-size:.95rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem 0 .5rem 1.5rem;text-align:right;vertical-align:top;white-space:nowrap;font-weight:400}
thead th{white-space:normal;text-wrap:balance;line-height:1.3}
th:first-child{padding-left:0;text-align:left;position:sticky;left:0;background:var(--paper)}
thead th{color:var(--muted);font-size:.85rem;vertical-align:bottom;border-bottom:1px solid var(--muted)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
tbody th{padding-left:1.15em!important;text-indent:-1.15em}
tbody i{text-indent:0;display:inline-block;width:.6em;height:.6em;border-radius:50%;margin-right:.55em}
small{display:block;font-size:.8rem;color:var(--muted)}
.legend,figcaption{font-size:.85rem;color:var(--muted);margin:.6rem 0 0;line-height:1.45}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,23rem),1fr));gap:2rem 2.5rem;
 margin:2.5rem 0;align-items:start}
figure{margin:0;max-width:32rem;min-width:0}
svg{display:block;width:100%;height:auto}
svg image{image-rendering:pixelated}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,
 sans-serif!important}
section+section{margin-top:3.5rem;padding-top:2.5rem;border-top:1px solid var(--grid)}
nav{margin:0 0 3rem}
ol,ul{padding-left:1.25rem;margin:.5rem 0}
li{margin:.35rem 0;overflow-wrap:anywhere}
a{color:var(--s1)}
.problems{border-left:3px solid var(--s0);padding-left:1rem;margin:0 0 2.5rem}
details{margin-top:2rem;font-size:.9rem}
figure details{margin-top:.6rem}
figure table{min-width:0;font-size:.8rem;margin-top:.5rem}
figure tbody :is(th,td){padding:.25rem 0 .25rem .9rem;min-width:0;text-indent:0;white-space:nowrap}
figure tbody th:first-child{padding-left:0!important;white-space:normal;overflow-wrap:normal;min-width:4rem}
.head>*{color:var(--muted)}
tbody+tbody .head>*{padding-top:1rem;border-top:0}
summary{cursor:pointer;color:var(--muted)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.4rem 1.25rem;margin:1rem 0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
code{font:.9em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media(max-width:34rem){
 th,td{padding-left:1.1rem}
 tbody th{white-space:normal;min-width:7.5rem;overflow-wrap:anywhere}
 dl{display:block}
 dd{margin:0 0 .7rem}
}"""
