"""Makes results from the numbers and the environment of this process, and writes and reads their files."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import files
from kdjax.results import schema

PACKAGES = ("kdjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Commit, versions and hardware of this process.

    ``commit`` is "unknown" outside a git checkout; ``dirty`` says whether tracked files other than results differ.
    """
    import jax  # here: reading results must not start an accelerator

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results")
        ),
        "versions": versions,
        "hardware": {
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1),
        },
    }


def make(
    name: str,
    *,
    question: str,
    flags: Mapping[str, Any],
    seeds: Sequence[int],
    arms: Mapping[str, Mapping[str, Sequence[float]]],
    wall_clock_s: float,
    scaled_down: str = "",
    **optional: Any,
) -> dict[str, Any]:
    """Makes and checks one experiment's result, with the command line and the environment of this process.

    The arguments are fields of the schema in :mod:`kdjax.results`; ``optional`` are its optional ones.

    Raises:
      ValueError: if a metric does not have one finite value per seed, or another field breaks the schema.
    """
    content = {
        "schema": schema.SCHEMA,
        "name": name,
        "question": question,
        "command": command_line(),
        "flags": dict(flags),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment(),
        "wall_clock_s": round(wall_clock_s, 1),
        "scaled_down": scaled_down,
        "seeds": list(seeds),
        "arms": {
            a: {m: [float(v) for v in values] for m, values in metrics.items()} for a, metrics in arms.items()
        },
        **optional,
    }
    schema.check(content)
    return content


def write(path: str | os.PathLike[str], content: Mapping[str, Any], *, supersedes: str = "") -> None:
    """Checks a result of :func:`make` and writes it atomically, with a digest of its content.

    Args:
      path: of the file.
      content: the result.
      supersedes: why it supersedes the result that the file holds, which is then kept as ``history/NAME_COMMIT.json``
        beside it and named in the field ``supersedes``. Without a reason, or for a later result of the same run (of one
        ``plan``), the file is overwritten.

    Raises:
      ValueError: if it breaks the schema.
    """
    path = Path(path)
    earlier = read(path) if path.exists() and (supersedes or "plan" in content) else {}
    history = earlier.get("supersedes", [])
    if (
        earlier.get("plan") and earlier["plan"][:1] == content.get("plan", [])[:1]
    ):  # the same run, which went on
        content = {**content, "supersedes": history}
    elif earlier and supersedes:
        kept = {"result": _retire(path, earlier["commit"]), "why": supersedes}
        content = {**content, "supersedes": [kept, *history]}
    schema.check(content)
    files.write_json(path, {**content, "sha256": files.digest_json(content)})


def _retire(path: Path, commit: str) -> str:
    """Copies a result that is superseded into the history beside it, and returns where it is from there."""
    kept = Path("history") / f"{path.stem}_{commit[:8]}{path.suffix}"
    while (path.parent / kept).exists():
        kept = kept.with_stem(f"{kept.stem}_")
    (path.parent / kept).parent.mkdir(exist_ok=True)
    files.write_bytes(path.parent / kept, path.read_bytes())
    return kept.as_posix()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks one result file of this schema or an older one.

    Raises:
      ValueError: naming the file, and the field if one is wrong: if it is not JSON, of a newer schema, breaks the
        schema, or does not match its digest, which older results do not have.
    """
    text = Path(path).read_bytes()
    try:
        if not text.strip():
            raise ValueError("it is empty")
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a result file: {error}. Run its experiment again.") from error
    try:
        noted = content.pop("sha256", None) if isinstance(content, dict) else None
        if noted not in (None, files.digest_json(content)):
            raise ValueError("its content has changed since it was written. Run its experiment again.")
        content = schema.upgrade(content)
        schema.check(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def command_line() -> str:
    """The command that started this process, as ``python -m`` for a module, without this machine's paths."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    arguments = [argument.replace(os.getcwd() + os.sep, "") for argument in sys.argv[1:]]
    home = os.path.expanduser("~").rstrip(os.sep)  # empty if home is "/"
    if home:
        arguments = [argument.replace(home, "~") for argument in arguments]
    return f"python {program} {shlex.join(arguments)}".rstrip()


def _git(*arguments: str) -> str:
    """Output of a git command in this package's checkout; empty if there is none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
