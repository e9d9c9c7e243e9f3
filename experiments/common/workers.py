"""Processes that do parts of one command side by side, and end with it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_TASK = "KDJAX_TASK"  # not a flag, so that results name the command that the user gave


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
      ValueError: with the last line in the log of the first that failed.
      SystemExit: with its code, if it has told the terminal why.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    children: list[subprocess.Popen] = []
    try:
        for number, task in enumerate(tasks):
            environment = os.environ | {_TASK: json.dumps({module: task})}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number]
            output = open(logs[number], "wb") if logs else None  # noqa: SIM115
            # Nothing is ever written to the pipe: it breaks when this process ends, which the child waits for.
            children.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
                )
            )
            if output:
                output.close()  # the child has its own
        while any(child.poll() is None for child in children) and not any(
            child.returncode for child in children
        ):
            time.sleep(0.5)
            meanwhile()
        failed = next((number for number, child in enumerate(children) if child.returncode), None)
    finally:
        _end(children)
    if failed is None:
        return
    code = children[failed].returncode
    if not logs:
        sys.exit(code)
    said = logs[failed].read_text(errors="replace").strip().splitlines() or ["nothing was said."]
    raise ValueError(
        f"worker {failed} ended with code {code}: {said[-1].removeprefix('error: ')} Its output is in {logs[failed]}; "
        "the same command continues."
    )


def _end(children: Sequence[subprocess.Popen]) -> None:
    """Asks those that still run to save and stop, and waits for them."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def end_with_parent() -> None:
    """Lets a child save and stop when its parent is gone, however that ended."""

    def watch() -> None:
        while os.read(0, 1):  # nothing, at the end of the pipe
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
