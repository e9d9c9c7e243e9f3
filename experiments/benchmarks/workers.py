"""Contenders of a benchmark side by side, each in a process of its own that is idle while the others work.

PyTorch may be installed in another Python than kdjax, and a process has one thread pool and one peak of memory. So a
benchmark starts a :class:`Worker` for every contender and number of threads; the process runs ``main`` of the
benchmark's module of baselines, which calls :func:`serve`. It first says whether its imports succeeded. Then it reads
one JSON object per line and answers each with another. This module needs no package, since all interpreters import it.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import pin

# In the process of the benchmark


class Worker:
    """A process of one contender, idle until it is asked."""

    def __init__(self, contender: str, threads: int, workload: Path, *, python: str, baselines: str):
        self.contender, self.threads = contender, threads
        dropped = {"JAX_COMPILATION_CACHE_DIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        self.errors = open(workload.parent / f"{contender}-{threads}.log", "w+")  # noqa: SIM115
        program = f"from experiments.benchmarks.{baselines} import main; main()"
        self.process = subprocess.Popen(
            [python, "-c", program, contender, str(threads), str(workload)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        hello = self.heard("start")
        self.absent: str | None = hello.get("absent")
        self.arms: list[str] = hello.get("arms", [])
        self.import_s: float = hello.get("import_s", 0.0)

    def ask(self, job: str, **options: Any) -> dict[str, Any]:
        """Sends a job and waits for the answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the reason is in its log
            print(json.dumps({"job": job} | options), file=self.process.stdin, flush=True)
        return self.heard(job)

    def heard(self, job: str) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{self.contender} with {self.threads} threads stopped at {job!r}: {last}.")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@contextmanager
def working(
    pythons: Mapping[str, str], threads: Sequence[int], workload: Path, *, baselines: str
) -> Iterator[list[Worker]]:
    """Starts a worker for each contender and number of threads, and ends them afterwards.

    Args:
      pythons: contender → its interpreter.
      threads: numbers of threads.
      workload: a file for all of them.
      baselines: the module of ``experiments.benchmarks`` whose ``main`` they run.
    """
    workers: list[Worker] = []
    try:
        for contender, python in pythons.items():
            for count in threads:
                workers.append(Worker(contender, count, workload, python=python, baselines=baselines))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def versions_of(packages: Sequence[str], *, python: str) -> dict[str, str]:
    """Package → version, in the interpreter that has them."""
    if not packages:
        return {}
    code = (
        "import importlib.metadata as m, json, sys; print(json.dumps([m.version(x) for x in sys.argv[1:]]))"
    )
    command = [python, "-c", code, *packages]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(packages, json.loads(said), strict=True))


# In the process of a contender


def peak_mib(call: Callable[[], Any]) -> float | None:
    """Peak of resident memory during the call, less that before it; None except on Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def resident(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide new allocations
    reset.write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def free_mib() -> float | None:
    """Memory that a process could still allocate; None except on Linux."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    line = next((line for line in table.read_text().splitlines() if line.startswith("MemAvailable")), None)
    return None if line is None else int(line.split()[1]) / 1024


def serve(
    contenders: Mapping[str, Callable[[], Any]], answer: Callable[[Any, Path, dict[str, Any]], dict[str, Any]]
) -> None:
    """Answers lines from stdin on stdout until there are no more; called by ``main`` of a module of baselines.

    Args:
      contenders: name → its constructor, which raises ImportError where a package is missing.
      answer: does one job, ``answer(contender, workload, asked)``.
    """
    name, threads, workload = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    pin(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of the libraries does not mix with the answers

    def say(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        contender = contenders[name]()
    except ImportError as error:
        say({"absent": str(error)})
        return
    say({"arms": contender.arms, "import_s": time.perf_counter() - start})
    for line in sys.stdin:
        say(answer(contender, workload, json.loads(line)))
