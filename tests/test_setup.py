"""``make demo`` and ``make test`` on a machine that lacks something: one sentence that says what, and no success."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.once
needs_make = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "awk", "make"))),
    reason="set-up is for systems with bash, awk and make",
)


@pytest.fixture
def clone(tmp_path):
    """A copy of what set-up reads, without an environment."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copytree(ROOT / "kdjax", tmp_path / "kdjax", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def fake_python(path: Path, answer: str) -> Path:
    """An interpreter that knows only what .ci/pythons asks."""
    path.write_text(f'#!/usr/bin/env bash\necho "{answer} $0"\n')
    path.chmod(0o755)
    return path


def make(clone: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs make; what it printed on stderr but for make's own last line."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", *arguments], cwd=clone, env=clean | environment, capture_output=True, text=True, timeout=900
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    return done.returncode, "\n".join(said)


@needs_make
@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("3.10.13 venv", "kdjax: needs Python 3.11 or newer and found 3.10.13 ("),
        ("2.7.18 bare", "kdjax: needs Python 3.11 or newer and found 2.7.18 ("),
        ("3.12.1 bare", "kdjax: Python 3.12.1 has no venv module; install it"),
    ],
)
def test_python_that_does_not_do(clone, target, answer, sentence):
    python = fake_python(clone / "fake", answer)
    code, said = make(clone, target, f"PYTHON={python}")
    assert code != 0
    assert said.startswith(sentence)
    assert said.count("\n") == 0
    assert not (clone / ".venv").exists()


@needs_make
def test_python_that_is_not_there(clone):
    code, said = make(clone, "demo", "PYTHON=no-such-python")
    assert code != 0
    assert said.startswith("kdjax: PYTHON=no-such-python does not run")


@needs_make
def test_no_network_then_foreign_environment(clone):
    code, said = make(
        clone, "demo", f"PYTHON={sys.executable}",
        PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0",
    )  # fmt: skip
    assert code != 0
    assert said.startswith("kdjax: pip could not reach the package index")
    assert said.count("\n") == 0
    assert "127.0.0.1" in (clone / ".venv" / "pip.log").read_text()
    assert not (clone / ".venv" / "ready").exists()

    (clone / ".venv" / "pip.log").unlink()
    code, said = make(clone, "demo", f"PYTHON={sys.executable}")
    assert code != 0
    assert said.startswith("kdjax: .venv exists and was not made by make")


@needs_make
def test_second_time_is_instant_and_stale_is_noticed(clone):
    """An environment counts as ready only for the pyproject.toml and the extras that it was made for."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    checksum = subprocess.run(
        "cksum <pyproject.toml", shell=True, cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    (clone / ".venv" / "ready").write_text(f"{checksum}experiments,test\n")

    def setup(extras: str) -> int:
        script = [".ci/setup", ".venv", extras]
        return subprocess.run(
            script, cwd=clone, env={"PATH": os.environ["PATH"]}, capture_output=True
        ).returncode

    assert setup("experiments") == 0
    assert setup("experiments,test") == 0
    assert setup("export") != 0  # it has no pip to install with
    (clone / ".venv" / "ready").write_text(f"{checksum}experiments,test\n")
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert setup("experiments") != 0


EXTRAS = ("data", "report", "experiments")


def test_tpu_pins_satisfy_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        Requirement(requirement)
        for group in (project["dependencies"], *map(project["optional-dependencies"].get, EXTRAS))
        for requirement in group
        if not requirement.startswith("kdjax[")  # experiments holds the other two
    ]
    lines = (ROOT / "requirements-tpu.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    version = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    on_tpu = [r for r in declared if not r.marker or r.marker.evaluate({"python_version": "3.12"})]
    assert [str(r) for r in on_tpu if not r.specifier.contains(version[canonicalize_name(r.name)])] == []
    assert any("tpu" in pin.extras for pin in pins)
