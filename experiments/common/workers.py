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

from experiments import process

_TASK = process.WORKER  # not a flag, so that results name the command that the user gave


def my_task(module: str) -> Any:
    """What this process was started for by :func:`in_children` of ``module``; None in one that is not its child."""
    started = json.loads(os.environ.get(_TASK, "{}"))
    return started.get(module)


def in_children(
    module: str,
    tasks: Sequence[Any],
    *,
    gpus: Sequence[str] = (),
    logs: Sequence[Path] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Runs this command in a process for each task; ends all of them when one fails, or this process does.

    Args:
      module: that the user started.
      tasks: what :func:`my_task` returns in each, plain JSON.
      gpus: of each, as ``CUDA_VISIBLE_DEVICES`` names them; all see all if not given.
      logs: where each writes its output; on the terminal if not given.
      meanwhile: called every half second.

    Raises:
      ValueError: with the last line in the log of the first that failed, or if it was killed.
      SystemExit: with its code, if it has told the terminal why.
      process.Stopped: if this process, or one of them, was asked to stop. All have saved by then.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    children: list[subprocess.Popen] = []
    with _signals() as received, _ended(children):
        for number, task in enumerate(tasks):
            environment = os.environ | {_TASK: json.dumps({module: task})}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number]
            output = open(logs[number], "wb") if logs else None  # noqa: SIM115
            # Nothing is ever written to the pipe: it breaks when this process ends, which the child waits for.
            # A group of its own, since a terminal sends Ctrl-C to the whole group of this process.
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
            children.append(subprocess.Popen(command, env=environment, process_group=0, **pipes))
            if output:
                output.close()  # the child has its own
        codes: list[int | None] = []
        while not received:
            codes = [child.poll() for child in children]
            if any(codes) or None not in codes:
                break
            time.sleep(0.5)
            meanwhile()
    if received:
        raise process.Stopped(received[0], "the workers have saved; the same command continues.")
    failed, code = next(((number, code) for number, code in enumerate(codes) if code), (None, 0))
    if failed is None:
        return
    for asked in process.SIGNALS:
        if code in (-asked, 128 + asked):
            raise process.Stopped(
                asked, f"worker {failed} was told to, so all have saved; the same command continues."
            )
    if code < 0:
        raise ValueError(
            f"worker {failed} was killed ({signal.Signals(-code).name}), by the system if its memory ran out; the same "
            "command continues."
        )
    if not logs:
        sys.exit(code)
    said = logs[failed].read_text(errors="replace").strip().splitlines() or ["nothing was said."]
    raise ValueError(
        f"worker {failed} ended with code {code}: {said[-1].removeprefix('error: ')} Its output is in {logs[failed]}; "
        "the same command continues."
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the numbers of the signals by which this process is asked to stop, for the caller to act on."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in process.heeded()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ended(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Asks those that still run in the end to save and stop, and waits for them."""
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


def end_with_parent() -> None:
    """Lets a child save and stop when its parent is gone, however that ended."""

    def watch() -> None:
        while os.read(0, 1):  # nothing, at the end of the pipe
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
