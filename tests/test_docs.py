"""What the documents say is run: Python blocks, docstring examples, commands and their flags, links, tables."""

import ast
import doctest
import importlib
import re
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from absl.flags import FLAGS

from kdjax import losses, report, results, train

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(path for name in ("README.md", "BUILD_NOTES.md", "CHANGELOG.md") if (path := ROOT / name).exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]
RESULTS = ROOT / "experiments" / "results"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[tuple[str, int, str]]:
    """Fenced blocks of a Markdown file: an id, the line of the first statement, the text."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]
    return [(f"{name_of(path)}:{line}", line, code) for line, code in lines]


# Haiku and Equinox may warn of what they like; our own warnings are errors in the tests of the modules.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=name_of)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """The blocks of a page run in order and share their names, as the cells of a notebook do; for two epochs each."""
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "example"}
    for name, line, code in blocks(path, "python"):
        quick = re.sub(r"\bepochs=\d+", "epochs=2", code)
        program = compile("\n" * (line - 1) + quick, name, "exec")
        for made_before in ("apply_fn", "params", "model_state"):
            scope.pop(made_before, None)
        try:
            exec(program, scope)
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package in {"", "kdjax", "experiments"}:
                raise
            pytest.skip(f"{name} needs {package}, which is not installed")
        if {"apply_fn", "params", "model_state"} <= scope.keys():
            learns(scope["apply_fn"], scope["params"], scope["model_state"])


def learns(apply_fn, params, model_state):
    """What the document shows as an ``ApplyFn`` must train under kdjax's own step."""

    def objective(outputs, batch):
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
        return {"hard": jnp.mean(hard)}

    tx = optax.adam(1e-2)
    step = jax.jit(train.make_train_step(apply_fn, objective, tx))
    state = train.init_state(params, model_state, tx, seed=0)
    batch = {"image": jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), "label": jnp.arange(8) % 10}
    values = []
    for _ in range(10):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.7 * values[0]


def docstring_examples() -> list[tuple[str, str, str, int]]:
    """Docstrings of kdjax that hold ``>>>``: module, qualified name, text, line.

    Read from the source, because ``doctest`` does not look into functions that the typing hook has wrapped.
    """
    found = []
    for path in sorted((ROOT / "kdjax").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    found.append((module, getattr(node, "name", "module"), text, getattr(node, "lineno", 1)))
    return found


@pytest.mark.parametrize(
    ("module", "name", "text", "line"),
    [pytest.param(*example, id=f"{example[0]}.{example[1]}") for example in docstring_examples()],
)
def test_docstring_example_runs(module, name, text, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(text, scope, f"{module}.{name}", module, line)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


GENERATED = re.compile(r"<!-- (?:results|summary): .*?<!-- end -->", re.DOTALL)


def commands(path: Path) -> list[tuple[str, str, set[str]]]:
    """Every ``python -m experiments.…`` of a document, over continued lines: module, what it sweeps, names of flags.

    Tables are left out: they show the command of the commit that they were measured at.
    """
    text = GENERATED.sub("", path.read_text(encoding="utf-8"))
    found = re.findall(r"python3? -m (experiments(?:\.\w+)+)([^\n`|]*)", re.sub(r"\\\n\s*", " ", text))
    return [
        (
            module,
            "".join(re.findall(r"--experiment=(\w+)", arguments)),
            set(re.findall(r"(?<!\S)--?([a-z]\w*)", arguments)),
        )
        for module, arguments in found
    ]


COMMANDS: dict[tuple[str, str], dict[str, set[str]]] = {}
for document in DOCUMENTS:
    for module, swept, flags in commands(document):
        COMMANDS.setdefault((module, swept), {}).setdefault(name_of(document), set()).update(flags)


@pytest.mark.parametrize(("module", "swept"), sorted(COMMANDS))
def test_commands_have_the_flags_that_documents_give(module, swept, alone):
    sweep = "experiments.sweep.__main__"
    with alone(sweep if swept else module):
        swept_alone = alone(f"experiments.{swept}", keep=(sweep,)) if swept else nullcontext()
        with swept_alone:
            booleans = {name for name in FLAGS if FLAGS[name].boolean}
            known = {"help", *FLAGS, *(f"no{name}" for name in booleans)}
    unknown = {name: given - known for name, given in COMMANDS[module, swept].items() if given - known}
    assert unknown == {}


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = [
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for target in [target for target in targets if not re.match(r"[a-z]+:", target)]:
        name, _, anchor = target.partition("#")
        to = path.parent / name if name else path
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            broken.append(target)
    assert broken == []


def test_the_guide_links_every_public_loss_to_its_module():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\.\./kdjax/losses/(\w+)\.py\)", text, flags=re.MULTILINE)
    public = {name: value for name, value in vars(losses).items() if callable(value) and name[0] != "_"}
    wanted = [(name, value.__module__.rpartition(".")[2]) for name, value in public.items()]
    assert sorted(listed) == sorted(wanted)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_tables_are_those_of_the_result_files(path):
    assert path.read_text(encoding="utf-8") == report.fill_tables(path, RESULTS), (
        "run python -m experiments.report --documents=README.md,docs"
    )


def test_every_result_has_a_table():
    """A measured result that no page shows could be hidden."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    names = {path.relative_to(RESULTS).with_suffix("").as_posix() for path in RESULTS.rglob("*.json")}
    earlier = {name for name in names if name.split("/")[-2:-1] == ["history"]}  # beside what supersedes it
    assert names - earlier <= set(re.findall(r"<!-- results: (\S+)", text))
    # What is superseded is named by the small print of what supersedes it.
    for name in earlier:
        beside, below = name.rsplit("history/", 1)
        kept = f"supersedes [history/{below}.json](../../experiments/results/{beside}history/{below}.json)"
        assert kept in text, name


def test_every_page_is_on_the_map():
    """Each page of docs/ is linked from the map of its folder."""
    for index in (ROOT / "docs").rglob("index.md"):
        linked = set(re.findall(r"\]\(([^()#\s]+)", index.read_text(encoding="utf-8")))
        assert {page.name for page in index.parent.glob("*.md") if page != index} <= linked


def test_a_summary_shows_the_arm_its_baseline_and_the_corrected_p(tmp_path):
    """One row per study, with the numbers of that study's own table."""
    (tmp_path / "page.md").write_text("<!-- summary: accuracy\nDigits: quickstart/kd\n-->\n<!-- end -->")
    row = report.fill_tables(tmp_path / "page.md", RESULTS).splitlines()[-3]
    table = report.markdown_table(results.read(RESULTS / "quickstart.json"), metrics=["accuracy"])
    arms = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[2].rstrip("| ") for line in table.splitlines()
    }
    value, _, p = arms["kd"].removesuffix(")").partition(" (")
    assert re.sub(r"\(.*?\)", "", row) == f"| [Digits] | kd | 5 | {arms['scratch']} | {value} | {p} |"
