"""Stopping a run from outside: SIGTERM and Ctrl-C are answered between two dispatches, once the run has been saved."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax


class Stopped(SystemExit):
    """The process was asked to stop. Uncaught, it ends with exit code 128 plus the signal's number, as shells count.

    Attributes:
      signal: its number, ``signal.SIGTERM`` or ``signal.SIGINT``.
      step: the steps that were done, in a training.
      message: one sentence for the user: the signal, and what was saved.
    """

    def __init__(self, number: int, outcome: str, *, step: int | None = None):
        super().__init__(128 + number)
        self.signal, self.step = signal.Signals(number), step
        name = "Ctrl-C" if number == signal.SIGINT else self.signal.name
        self.message = f"stopped by {name}; {outcome}"


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int]]:
    """Yields a function to call after each dispatch with the step: the signal that asks to stop there, or 0.

    A second Ctrl-C interrupts at once. With several processes JAX's own preemption service decides, so that all of them
    stop at the same step even if only one was told to. Outside the main thread, which alone may handle signals, the
    handlers stay as they are, and so does Ctrl-C in an interactive session, which should outlive the run.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return
    received: list[int] = []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    signals = [signal.SIGTERM] if hasattr(sys, "ps1") else [signal.SIGTERM, signal.SIGINT]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    # A shell starts background jobs with SIGINT ignored, and None is a handler that Python cannot put back.
    signals = [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, note) for number in signals}
    try:
        yield lambda step: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
