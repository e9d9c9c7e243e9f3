"""A module of kdjax imports only from lower layers, and the lower layers need only jax, optax, numpy and jaxtyping."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kdjax"
EXPERIMENTS = ROOT / "experiments"

LAYERS = [
    {"types", "files", "extras", "interrupts", "options"},
    {"parallel", "significance", "data", "representations"},
    {"losses", "models", "curvature", "landscape", "attributions", "checkpoints", "results"},
    {"teacher", "saddles", "train", "evaluate", "report", "quantisation"},
    {"transforms", "robustness", "vmapped", "callbacks", "export"},
    {"recipe", "methods"},
    {"pipeline", "flatness", "saliency"},
    {"run"},
    {"study", "recruit"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer} | {"__init__": len(LAYERS)}

# What a JAX project without Flax can use: nothing else may be imported when these modules are.
LIGHT_MODULES = (LAYERS[0] | LAYERS[1] | LAYERS[2] | {"transforms", "__init__"}) - {"models"}
LIGHT_PACKAGES = {"jax", "optax", "numpy", "jaxtyping", "kdjax"}

# What the library must do without: launching is for experiments, and TensorFlow is for nobody.
FORBIDDEN = {"absl", "experiments", "tensorflow", "torch", "keras"}


class Import(NamedTuple):
    """One imported module, absolute."""

    name: str
    line: int
    at_import: bool  # runs when the importing module is imported, neither later nor for type checkers only


def files() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


def module_of(path: Path) -> str:
    """The module or package of kdjax, named as in LAYERS, that a file belongs to."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """All imports of a file, inside functions too, without executing anything."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    return _imports(ast.parse(path.read_text(encoding="utf-8")), package, at_import=True)


def _imports(node: ast.AST, package: tuple[str, ...], *, at_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_import)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        base = ".".join((*above, *filter(None, [node.module])))
        for alias in node.names:  # `from kdjax import losses` imports kdjax.losses
            yield Import(f"{base}.{alias.name}", node.lineno, at_import)
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    )
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package, at_import=at_import and not later)


def complaint(path: Path, found: Import) -> str | None:
    """What is wrong with one import of a file of kdjax; None where nothing is."""
    module, (package, *rest) = module_of(path), found.name.split(".")
    if package in FORBIDDEN:
        return f"imports {package}, which the library does without"
    if package == "kdjax":
        target = rest[0] if rest and rest[0] in RANK else "__init__"
        if target != module and RANK[target] >= RANK[module]:
            return f"imports kdjax.{target} of layer {RANK[target]} into layer {RANK[module]}"
    light = package in LIGHT_PACKAGES | sys.stdlib_module_names
    if module in LIGHT_MODULES and found.at_import and not light:
        return f"imports {package} when it is imported; import it inside the function that needs it"
    return None


def complaints(path: Path) -> list[str]:
    return [f"{path.name}:{i.line} {c}" for i in imports(path) if (c := complaint(path, i))]


def test_every_module_has_a_layer():
    assert {module_of(path) for path in files()} <= RANK.keys(), "add the new module to LAYERS"
    assert sum(map(len, LAYERS)) + 1 == len(RANK), "a module stands in two layers"


def test_what_a_user_of_the_wheel_needs_is_in_the_library():
    assert not list(EXPERIMENTS.glob("common/*.py")), (
        "what experiments share is kdjax's, or of experiments.cli"
    )


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_point_down(path):
    assert complaints(path) == []


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_imports_an_experiment(path):
    wrong = [
        f"{path.name}:{i.line} imports {i.name}"
        for i in imports(path)
        if i.name.split(".")[0] == "experiments" and is_launched(i.name)
    ]
    assert wrong == []


def is_launched(module: str) -> bool:
    """Whether it is an experiment, and not what experiments share."""
    parts = module.split(".")
    paths = [
        ROOT.joinpath(*parts[:n]).with_suffix(".py") for n in (len(parts) - 1, len(parts))
    ]  # or a name in it
    return any(
        '__name__ == "__main__"' in path.read_text(encoding="utf-8") for path in paths if path.exists()
    )


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("losses/logits", "from kdjax import types", None),
        ("losses/logits", "from kdjax.losses import maps", None),
        ("losses/logits", "from . import maps", None),
        ("losses/logits", "from ..types import Batch", None),
        ("losses/logits", "import kdjax.train", "imports kdjax.train of layer"),
        ("losses/logits", "from .. import train", "imports kdjax.train of layer"),
        ("losses/logits", "from ..models import build", "imports kdjax.models of layer"),
        ("train", "from kdjax import evaluate", "imports kdjax.evaluate of layer"),
        ("train", "import kdjax", "imports kdjax.__init__ of layer"),
        ("train", "def f():\n  from kdjax import report", "imports kdjax.report of layer"),
        ("train", "from flax import linen", None),
        ("train", "from absl import flags", "imports absl, which the library does without"),
        (
            "export",
            "def f():\n  import tensorflow as tf",
            "imports tensorflow, which the library does without",
        ),
        ("curvature", "def f():\n  import scipy", None),
        ("curvature", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import scipy", None),
        (
            "curvature",
            "try:\n  import scipy\nexcept ImportError:\n  pass",
            "imports scipy when it is imported",
        ),
        ("data/datasets", "import tensorflow_datasets", "imports tensorflow_datasets when it is imported"),
    ],
)
def test_the_rules_themselves(module, source, expected):
    path = LIBRARY / f"{module}.py"
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = [complaint(path, i) for i in _imports(ast.parse(source), package, at_import=True)]
    said = [c for c in found if c]
    assert said == [] if expected is None else [c[: len(expected)] for c in said] == [expected]
