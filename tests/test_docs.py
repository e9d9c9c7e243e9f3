"""What the documents say is run: Python blocks, docstring examples, commands and their flags, links."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from kdjax import losses, report, train

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(path for name in ("README.md", "BUILD_NOTES.md") if (path := ROOT / name).exists()),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]

# Flags that absl adds to every program.
ABSL_FLAGS = {
    "help",
    "helpfull",
    "helpshort",
    "flagfile",
    "undefok",
    "verbosity",
    "logtostderr",
    "alsologtostderr",
}


def blocks(path: Path, language: str) -> list[tuple[str, int, str]]:
    """Fenced blocks of a Markdown file: an id, the line of the first statement, the text."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]
    return [(f"{path.name}:{line}", line, code) for line, code in lines]


PYTHON_BLOCKS = [block for path in DOCUMENTS for block in blocks(path, "python")]


# Haiku and Equinox may warn of what they like; our own warnings are errors in the tests of the modules.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "line", "code"), PYTHON_BLOCKS, ids=[name for name, _, _ in PYTHON_BLOCKS])
def test_python_block_runs(name, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = compile("\n" * (line - 1) + code, name, "exec")
    scope: dict = {"__name__": "example"}
    try:
        exec(program, scope)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in {"", "kdjax", "experiments"}:
            raise
        pytest.skip(f"needs {package}, which is not installed")
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


def commands(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Every ``python -m experiments.…`` of a document, over continued lines, what it sweeps, and its flags' names."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    found = re.findall(r"python3? -m (experiments(?:\.\w+)+)([^\n`|]*)", text)
    return [
        (
            module,
            "".join(re.findall(r"--experiment=(\w+)", arguments)) or "distill",
            tuple(re.findall(r"(?<!\S)--?([a-z]\w*)", arguments)),
        )
        for module, arguments in found
    ]


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def defined_flags(module: str, seen: set[str] | None = None) -> set[str]:
    """Names of the absl flags of an experiment and of what it imports from ``experiments``, without running it."""
    seen = set() if seen is None else seen
    if module in seen or not source_of(module).exists():
        return set()
    seen.add(module)
    names = set()
    for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith("DEFINE_"):
            names |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                names |= defined_flags(str(name), seen)
    return names


COMMANDS = sorted({(path.name, *command) for path in DOCUMENTS for command in commands(path)})


@pytest.mark.parametrize(("document", "module", "swept", "flags"), COMMANDS)
def test_command_exists(document, module, swept, flags):
    assert source_of(module).exists(), f"{document} runs {module}, which is not there"
    defined = defined_flags(module) | ABSL_FLAGS
    if module == "experiments.sweep":  # its command line holds that of the experiment
        defined |= defined_flags(f"experiments.{swept}")
    unknown = {flag for flag in flags if flag not in defined and flag.removeprefix("no") not in defined}
    assert unknown == set(), f"{document} gives {module} flags that it does not define"


def test_the_guide_links_every_public_loss_to_its_module():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\.\./kdjax/losses/(\w+)\.py\)", text, flags=re.MULTILINE)
    public = {name: value for name, value in vars(losses).items() if callable(value) and name[0] != "_"}
    wanted = [(name, value.__module__.rpartition(".")[2]) for name, value in public.items()]
    assert sorted(listed) == sorted(wanted)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(path):
    filled = report.fill_tables(path, ROOT / "experiments" / "results")
    assert path.read_text(encoding="utf-8") == filled, (
        "run python -m experiments.report --documents=docs/results,README.md,BUILD_NOTES.md"
    )
