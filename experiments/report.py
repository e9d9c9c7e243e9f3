r"""What have all experiments found? One page of every result file, and the tables of the documents.

    python -m experiments.report --results=experiments/results --output=report.html
    python -m experiments.report --results=runs --output=runs/report.html
    python -m experiments.report --documents=README.md,docs

The third form writes no page. It rewrites the tables of Markdown documents between <!-- results: NAME --> and
<!-- end -->, from experiments/results; run it after a result file has changed, since a test fails where a table differs
from its file. A page takes a second for every few figures, and 50 kB for each: all of experiments/results is a minute
and 8 MB. It needs no network and reads on a phone, light or dark. A file that is damaged, not a result, or from a newer
kdjax is named on the page and on the terminal; the others are still reported, and the exit code is then 1.
"""

import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from kdjax import files, report, results
from kdjax.callbacks import bar

RESULTS = flags.DEFINE_string(
    "results",
    "experiments/results",
    "A result file; or a directory, searched for every results.json if it holds any, else for *.json.",
)
OUTPUT = flags.DEFINE_string("output", None, "Page to write, such as report.html.")
DOCUMENTS = flags.DEFINE_list(
    "documents",
    [],
    "Markdown documents whose marked tables are rewritten: files, patterns such as docs/*.md, or directories, of which "
    "every *.md is taken.",
)
TITLE = flags.DEFINE_string("title", "What kdjax has measured", "Title of the page.")


def main() -> None:
    """Writes the page, then the tables, and names every result file that could not be read."""
    if not (OUTPUT.value or DOCUMENTS.value):
        raise ValueError("--output is missing: name the page to write, as in --output=report.html.")
    root, problems = Path(RESULTS.value), []
    if OUTPUT.value:
        found, problems = load(root)
        write_page(found, problems)
    for document in expand(DOCUMENTS.value):
        filled = report.fill_tables(document, root)
        files.write_text(document, filled)
        if found := report.count_places(filled):
            print(f"{document}: {found} from {root}.")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def load(root: Path) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Reads a result file, or all of a directory.

    Returns:
      Name on the page → result, and a sentence for each file that could not be read.

    Raises:
      ValueError: if there is no result file.
    """
    # A run keeps other JSON files beside its results.json; a directory of results has a name for each.
    paths = sorted(root.rglob("results.json")) or sorted(root.rglob("*.json")) if root.is_dir() else [root]
    if not paths or not paths[0].exists():
        raise ValueError(
            f"--results={root} holds no result file (*.json); run an experiment first, or name another."
        )
    found, problems = {}, []
    for path in paths:
        try:
            found[name_of(path, root)] = results.read(path)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}.")
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def name_of(path: Path, root: Path) -> str:
    """The name of a result on the page: that of its file, or of the run whose file it is."""
    if path == root:
        return path.stem
    within = path.relative_to(root)
    return str(within.parent if within.name == "results.json" else within.with_suffix(""))


def expand(documents: Sequence[str]) -> list[Path]:
    """The Markdown files that files, patterns and directories stand for.

    Raises:
      ValueError: if one of them stands for no file.
    """
    found: dict[Path, None] = {}
    for name in documents:
        paths = sorted(Path(name).rglob("*.md")) if Path(name).is_dir() else sorted(glob.glob(name))
        if not paths:
            raise ValueError(f"--documents={name} matches no Markdown file.")
        found |= dict.fromkeys(map(Path, paths))
    return list(found)


def write_page(found: Mapping[str, Mapping[str, Any]], problems: Sequence[str]) -> None:
    """Writes the page with a progress bar over the results, and prints its size."""
    output = Path(OUTPUT.value or "")
    with bar(str(output), total=len(found), unit="result") as meter:
        report.page(
            found,
            path=output,
            title=TITLE.value,
            problems=problems,
            progress=lambda done: meter.update(done - meter.n),
        )
    size = output.stat().st_size / 1e6
    print(f"{output}: {len(found)} of {len(found) + len(problems)} results, {size:.1f} MB.")


if __name__ == "__main__":
    cli.launch(main)
