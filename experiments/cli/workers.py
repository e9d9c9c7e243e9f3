"""Processes that do parts of one command side by side, and end with it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import stopping
from kdjax.interrupts import Stopped

_TASK = stopping.WORKER  # not a flag, so that results name the command that the user gave


def my_task(module: str) -> Any:
    """The task for which :func:`in_children` of ``module`` started this process; None in any other.

    A child saves and stops when its parent is gone, however that ended.
    """
    task = json.loads(os.environ.get(_TASK, "{}")).get(module)
    if task is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    return task


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing comes before the end of the pipe
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)


def in_children(
    module: str,
    tasks: Sequence[Any],
    *,
    gpus: Sequence[str] = (),
    logs: Sequence[Path] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Runs this command in one process per task; ends all of them when one fails, or this process is stopped.

    Args:
      module: that the user started.
      tasks: what :func:`my_task` returns in each, plain JSON.
      gpus: one per task, as ``CUDA_VISIBLE_DEVICES`` names it; every task sees all by default.
      logs: where each writes its output; on the terminal by default.
      meanwhile: called every half second.

    Raises:
      ValueError: with the last line in the log of the first that failed, or if it was killed.
      SystemExit: with its code, if it has told the terminal why.
      Stopped: if this process, or one of them, was asked to stop. All have saved by then.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    children: list[subprocess.Popen] = []
    with _signals() as received, _ended(children):
        for number, task in enumerate(tasks):
            environment = os.environ | {_TASK: json.dumps({module: task})}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number]
            with open(logs[number], "wb") if logs else contextlib.nullcontext() as output:
                # stdin is a pipe that breaks when this process ends, which the child waits for. A group of its own,
                # since a terminal sends Ctrl-C to the whole group of this process.
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
                with _on_cores(number, 1 if gpus else len(tasks)):
                    children.append(subprocess.Popen(command, env=environment, process_group=0, **pipes))
        codes: list[int | None] = []
        while not received:
            codes = [child.poll() for child in children]
            if any(codes) or None not in codes:
                break
            time.sleep(0.5)
            meanwhile()
    if received:
        raise Stopped(received[0], "the workers have saved; the same command continues.")
    for number, code in enumerate(codes):
        if code:
            _raise(number, code, logs)


@contextlib.contextmanager
def _on_cores(number: int, of: int) -> Iterator[None]:
    """Gives what is started within its share of this process's cores, where the system can and there are enough.

    Two processes that each compute with all cores wait for each other.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if of < 2 or len(cores) < of:
        yield
        return
    os.sched_setaffinity(0, cores[number::of])  # of this thread, which a child inherits
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _raise(number: int, code: int, logs: Sequence[Path]) -> None:
    """Raises what :func:`in_children` says of a worker that failed."""
    again = "the same command continues."
    for asked in stopping.SIGNALS:
        if code in (-asked, 128 + asked):
            raise Stopped(asked, f"worker {number} was asked to stop, so all have saved; {again}")
    if code < 0:
        name = signal.Signals(-code).name
        raise ValueError(f"worker {number} was killed ({name}), by the system if its memory ran out; {again}")
    if not logs:
        sys.exit(code)
    lines = logs[number].read_text(errors="replace").strip().splitlines() or ["it printed nothing."]
    raise ValueError(
        f"worker {number} ended with code {code}: {lines[-1].removeprefix('error: ')} Its output is in {logs[number]}; "
        f"{again}"
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask this process to stop, for the caller to act on."""
    received: list[int] = []
    previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in stopping.heeded()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ended(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Asks the children that still run in the end to save and stop, and waits for them."""
    try:
        yield
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdin:
                child.stdin.close()
