"""Timing side by side: calls take turns in every round, and their ratios are taken round by round."""

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)

# Threads and clocks


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def thread_counts(wanted: Sequence[str], *, smoke: bool) -> list[int]:
    """The numbers of ``--threads``; by default 1, and 2 where there are two cores."""
    counts = [int(x) for x in wanted] or [1, 2][: 1 if smoke else len(cores())]
    if not 1 <= min(counts) <= max(counts) <= len(cores()):
        raise ValueError(
            f"--threads={','.join(map(str, counts))} needs numbers from 1 to the {len(cores())} cores that this "
            "process has."
        )
    return counts


def pin(threads: int) -> None:
    """Keeps this process on so many cores; before a framework counts them, as XLA does at its first operation."""
    thread_counts([str(threads)], smoke=False)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[-threads:])


def clock(threads: int) -> Callable[[], float]:
    """CPU time with one thread, which other load disturbs least; the wall clock with more."""
    return time.process_time if threads == 1 else time.perf_counter


def clock_note(threads: int) -> str:
    """For the reader of a result."""
    return f"Clock: {'CPU time' if threads == 1 else 'wall'}. Seeds are rounds, not draws."


def label(what: str, threads: int) -> str:
    """``mlp, 2 threads``."""
    return f"{what}, {threads} thread{'s' * (threads > 1)}"


# Measuring


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of wall-clock and of CPU time, of all threads, and the result of the call."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, found


def in_turns(
    calls: Mapping[Name, Callable[[], Any]],
    rounds: int,
    *,
    seconds: float = 0.0,
    warmup: int = 2,
    read: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Milliseconds of a call, one number per round; the calls take turns, in an order that alternates.

    Args:
      calls: return when their result is there.
      rounds: turns of each call.
      seconds: length of one turn; at least one call.
      warmup: calls before the first round, of which the first compiles.
      read: the clock.
    """
    repeats, found = dict.fromkeys(calls, 1), {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(warmup):
            start = time.perf_counter()
            call()
            repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = read()
            for _ in range(repeats[name]):
                calls[name]()
            found[name].append(1e3 * (read() - start) / repeats[name])
    return found


def medians(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians of wall-clock and CPU seconds."""
    return {name: statistics.median(answer[name] for answer in answers) for name in ("wall", "cpu")}


def note(metrics: dict[str, list[float]], what: str, answer: Mapping[str, float]) -> None:
    """Appends wall-clock and CPU milliseconds to the metrics ``what_ms`` and ``what_cpu_ms``."""
    for name, suffix in (("wall", "ms"), ("cpu", "cpu_ms")):
        metrics.setdefault(f"{what}_{suffix}".lstrip("_"), []).append(1e3 * answer[name])


# Ratios and goals


def quotients(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Quotients round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def over(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median, low and high of the quotients of the rounds."""
    found = quotients(numerator, denominator)
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def said(ratio: Mapping[str, float]) -> str:
    """A ratio for the terminal."""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def goal(text: str, needed: float, ratio: Mapping[str, float], *, at_most: bool = False) -> dict[str, Any]:
    """A goal for a ratio, and whether its median meets it."""
    met = ratio["median"] <= needed if at_most else ratio["median"] >= needed
    return {"goal": text, "needed": needed, **ratio, "met": met}


def print_goals(goals: Sequence[Mapping[str, Any]]) -> None:
    """One line per goal."""
    for one in goals:
        print(f"{one['goal']}: {said(one)}, {'met' if one['met'] else 'NOT met'}")


# Flags


def check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a name in a list flag that there is not."""
    for name in names:
        if name not in known:
            raise ValueError(f"--{flag}={name} is none of {', '.join(known)}.")
