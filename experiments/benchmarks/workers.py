"""Contenders of a benchmark side by side, each in a process of its own that waits while the others work.

PyTorch's peers may live in another Python than kdjax, and each process has one thread pool and one peak of memory. So a
benchmark starts a :class:`Worker` for every contender and number of threads; there runs the ``main`` of the benchmark's
own module of peers, which is :func:`serve`. The process says first whether it could import what it needs. Then it reads
one JSON object per line and answers each with another. Nothing here needs more than NumPy, since all of them import it.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------ where the benchmark runs


class Worker:
    """A process of one contender, idle until it is asked."""

    def __init__(self, contender: str, threads: int, workload: Path, *, python: str, peers: str):
        self.contender, self.threads = contender, threads
        dropped = {"JAX_COMPILATION_CACHE_DIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        self.errors = open(workload.parent / f"{contender}-{threads}.log", "w+")  # noqa: SIM115
        # No module to be launched by itself, which this one could not import names from.
        program = f"from experiments.benchmarks.{peers} import main; main()"
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

    def ask(self, job: str, **options: Any) -> dict[str, Any]:
        """Sends a job and waits for the answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # whose reason is in its log
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
    pythons: Mapping[str, str], threads: int, workload: Path, *, peers: str
) -> Iterator[list[Worker]]:
    """Processes of workers, ended afterwards.

    Args:
      pythons: contender → the interpreter that has it.
      threads: of each.
      workload: a file that all of them are given.
      peers: the module of ``experiments.benchmarks`` whose ``main`` they run.
    """
    workers: list[Worker] = []
    try:
        for contender, python in pythons.items():
            workers.append(Worker(contender, threads, workload, python=python, peers=peers))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def thread_counts(wanted: Sequence[str], *, smoke: bool) -> list[int]:
    """Those that ``--threads`` names; by default 1 and 2, where there are two cores."""
    counts = [int(x) for x in wanted] or [1, 2][: 1 if smoke else len(cores())]
    if not 1 <= min(counts) <= max(counts) <= len(cores()):
        raise ValueError(
            f"--threads={','.join(map(str, counts))} needs numbers from 1 to the {len(cores())} cores that this "
            "process has."
        )
    return counts


def quotients(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def over(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median, low and high of the quotients of the rounds."""
    found = quotients(numerator, denominator)
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def note(metrics: dict[str, list[float]], what: str, answer: Mapping[str, float]) -> None:
    """Appends wall-clock and CPU milliseconds."""
    for clock, suffix in (("wall", "ms"), ("cpu", "cpu_ms")):
        metrics.setdefault(f"{what}_{suffix}".lstrip("_"), []).append(1e3 * answer[clock])


def goal(said: str, needed: float, ratio: Mapping[str, float], *, at_most: bool = False) -> dict[str, Any]:
    """What was wanted of a ratio, and whether its median is that."""
    met = ratio["median"] <= needed if at_most else ratio["median"] >= needed
    return {"goal": said, "needed": needed, **ratio, "met": met}


def tell(goals: Sequence[Mapping[str, Any]]) -> None:
    """Prints what became of each."""
    for goal in goals:
        verdict = "met" if goal["met"] else "NOT met"
        print(f"{goal['goal']}: {goal['median']:.2f} ({goal['low']:.2f} to {goal['high']:.2f}), {verdict}")


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


# ------------------------------------------------------------------------------- where a contender runs


def cores() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of wall-clock and of CPU time, of all threads, and what the call returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, found


def peak_mib(call: Callable[[], Any]) -> float | None:
    """How much more memory is resident during the call, at most, than before; None where Linux is not there to ask."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def resident(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is freed already would hide what is taken
    reset.write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def free_mib() -> float | None:
    """Memory that a process could still take; None where Linux is not there to ask."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    line = next((line for line in table.read_text().splitlines() if line.startswith("MemAvailable")), None)
    return None if line is None else int(line.split()[1]) / 1024


def serve(
    workers: Mapping[str, Callable[[], Any]], answer: Callable[[Any, Path, dict[str, Any]], dict[str, Any]]
) -> None:
    """Answers lines from stdin on stdout until there are no more; ``main`` of a module of peers.

    Args:
      workers: name → what makes it, and raises ImportError where it cannot be imported.
      answer: does one job, ``answer(contender, workload, asked)``.
    """
    name, threads, workload = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    if hasattr(os, "sched_setaffinity"):  # before any framework counts the cores
        os.sched_setaffinity(0, cores()[-threads:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not mix with the answers

    def say(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        contender = workers[name]()
    except ImportError as error:
        say({"absent": str(error)})
        return
    say({"arms": contender.arms})
    for line in sys.stdin:
        say(answer(contender, workload, json.loads(line)))
