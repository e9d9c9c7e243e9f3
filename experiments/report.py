r"""What have all experiments found? One page from every result file.

    python -m experiments.report --results=experiments/results --output=report.html
    python -m experiments.report --results=runs --output=runs/report.html
    python -m experiments.report --documents=README.md,docs

The third form writes no page, but the tables of those documents anew, between <!-- results: NAME --> and <!-- end -->;
a test fails where they differ from the files. A page takes a second for every few figures, and 40 kB for each: all of
experiments/results is a minute and 7 MB. It needs no network and reads on a phone, light or dark. A file that is
damaged, is no result or was written by a newer kdjax is named on the page and here; the others are still reported, and
the exit code is then 1.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common
from kdjax import files, report, results

RESULTS = flags.DEFINE_string(
    "results",
    "experiments/results",
    "A result file; or a directory, searched for every results.json if it holds any, else for *.json.",
)
OUTPUT = flags.DEFINE_string("output", None, "Page to write, such as report.html.")
DOCUMENTS = flags.DEFINE_list(
    "documents", [], "Markdown files, or folders of them, whose marked tables are written anew."
)
TITLE = flags.DEFINE_string("title", "What kdjax has measured", "Of the page.")


def main() -> None:
    """Reads what can be read, writes the page, and names what is not in it."""
    if not (OUTPUT.value or DOCUMENTS.value):
        raise ValueError("--output is missing: name the page to write, as in --output=report.html.")
    root = Path(RESULTS.value)
    # Beside its results.json a run keeps other files; a directory of results has a name for each.
    paths = sorted(root.rglob("results.json")) or sorted(root.rglob("*.json")) if root.is_dir() else [root]
    if not paths or not paths[0].exists():
        raise ValueError(
            f"--results={root} holds no result file (*.json); run an experiment first, or name another."
        )
    found, problems = report.load(paths)
    if OUTPUT.value:
        write_page(found, problems, root)
    for document in documents_of(DOCUMENTS.value):
        text = document.read_text(encoding="utf-8")
        folder = Path(os.path.relpath(root, document.parent)).as_posix()
        filled = report.fill_tables(text, lambda name: results.read(root / f"{name}.json"), folder=folder)
        if filled != text:
            files.write_text(document, filled)
            print(f"{document}: its tables are those of {root}.")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def documents_of(names: Sequence[str]) -> list[Path]:
    """The Markdown files that are named, or lie in the folders that are."""
    paths = map(Path, names)
    return [file for path in paths for file in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]


def write_page(found: Mapping[Path, Any], problems: Sequence[str], root: Path) -> None:
    """Writes the page, with a bar for the results that are drawn, and says how large it is."""
    output, names = Path(OUTPUT.value or ""), [name_of(path, root) for path in found]
    with common.bar(str(output), total=len(found), unit="result") as meter:

        def progress(done: int) -> None:
            meter.update(done - meter.n)

        report.page(
            list(found.values()),
            path=output,
            title=TITLE.value,
            names=names,
            problems=problems,
            progress=progress,
        )
    size = output.stat().st_size / 1e6
    print(f"{output}: {len(found)} of {len(found) + len(problems)} results, {size:.1f} MB.")


def name_of(path: Path, root: Path) -> str:
    """What a result is called on the page: as its file, or as the run whose file it is."""
    if path == root:
        return path.stem
    within = path.relative_to(root)
    return str(within.parent if within.name == "results.json" else within.with_suffix(""))


if __name__ == "__main__":
    common.launch(main)
