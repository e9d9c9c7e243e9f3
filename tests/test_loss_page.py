"""The page of the losses is the one that its command makes, has every name, and leads somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdjax import losses

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "losses.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMAND = "python -m experiments.loss_page --output=docs/losses.md"
PUBLIC = sorted(name for name, value in vars(losses).items() if callable(value) and not name.startswith("_"))
SECTIONS = {
    match[1]: match[2]
    for match in re.finditer(r"^### \[`(\w+)`\][^\n]*\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
}
ROWS = {
    cells[0].split("`")[1]: cells
    for line in TEXT.splitlines()
    if line.startswith("| [")
    for cells in [[cell.strip() for cell in line.strip("| ").split(" | ")]]
}


# A process of its own, since an experiment's flags would meet those of others in this one.
def make(path, root=ROOT):
    arguments = [sys.executable, "-m", "experiments.loss_page", f"--output={path}"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(arguments, env=environment, cwd=root, capture_output=True, text=True, timeout=120)


def test_page_is_what_the_command_makes(tmp_path):
    done = make(tmp_path / "losses.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "losses.md").read_text(encoding="utf-8") == TEXT, f"run {COMMAND}"
    assert COMMAND in TEXT.split("\n## ")[0]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_on_the_page(name):
    assert name in SECTIONS or f"\n- `{name}`: " in TEXT
    if name in ROWS:
        assert name in SECTIONS, f"the row of {name} leads nowhere"


@pytest.mark.parametrize("name", SECTIONS)
def test_section_is_whole(name):
    text = SECTIONS[name]
    assert len(re.findall("^```math$", text, flags=re.MULTILINE)) >= 1
    assert re.search(r"^- \*\*Paper\*\*: .*\b(19|20)\d\d\b", text, flags=re.MULTILINE)
    assert re.search(r"^- \*\*Cost\*\*: O\(.+\) time, O\(.+\) memory", text, flags=re.MULTILINE)
    assert re.search(r"^- \*\*Returns\*\*: ", text, flags=re.MULTILINE)
    prose = re.sub(r"```.*?```|`[^`]*`|\$`.*?`\$", "", text, flags=re.DOTALL)
    assert not re.search(r":\w+:|``|>`_|\.\. ", prose), "reStructuredText is left"


@pytest.mark.parametrize("name", ROWS)
def test_row_is_whole(name):
    assert len(ROWS[name]) == 6
    _, known_as, needs, per, cost, paper = ROWS[name]
    assert known_as
    assert needs
    assert per in {"example", "batch"}
    assert cost.startswith("O(")
    assert re.search(r"(19|20)\d\d", paper)


@pytest.mark.parametrize(
    ("name", "needs", "per"),
    [
        ("dkd", "logits, labels", "example"),
        ("teacher_free_kl", "student logits, labels", "example"),
        ("dist", "logits", "batch"),
        ("vid", "maps, log scale, `VidHead`", "example"),
        ("rkd_angle", "features", "batch"),
        ("crd", "embeddings, memory, candidates, `Embedding`", "example"),
        ("squared_error", "outputs, labels", "example"),
    ],
)
def test_needs_are_those_of_the_signature(name, needs, per):
    assert ROWS[name][2:4] == [needs, per]


def test_links_lead_somewhere():
    anchors = {heading.strip("`").replace(" ", "-").lower() for heading in headings()}
    targets = re.findall(r"\]\(([^()\s]+)\)", TEXT)
    assert {t[1:] for t in targets if t.startswith("#")} <= anchors
    assert [t for t in targets if not t.startswith(("#", "http")) and not (PAGE.parent / t).exists()] == []


def headings():
    """Their texts, without what they link to."""
    found = re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    return [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in found]


def test_a_docstring_that_lacks_something_is_named(tmp_path):
    for name in ("kdjax", "experiments"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.json", "*.png", "__pycache__")
        )
    for path in (tmp_path / "kdjax" / "losses").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("2203.08679>`_, 2022", "2203.08679>`_"), "utf-8")
    done = make(tmp_path / "losses.md", root=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: dkd lacks 'References:' with a year\n"
    assert not (tmp_path / "losses.md").exists()
