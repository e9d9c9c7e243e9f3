"""How a launched process ends when it is asked to stop; imports nothing heavy, so that it does from the start."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
WORKER = "KDJAX_TASK"  # set in the processes that another one started and speaks for


class Stopped(SystemExit):
    """The process was asked to stop; its exit code is 128 + signal, as a shell has it."""

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.message = f"stopped by {SIGNALS[signal.Signals(number)]}; {message}"


def heeded() -> list[signal.Signals]:
    """The signals that this process is not told to ignore, as a shell does with Ctrl-C for a job in the background."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def end_on_signals(advice: Callable[[], str] = lambda: "nothing was written.") -> None:
    """From now on SIGINT and SIGTERM end the process with one line that closes with ``advice()``.

    Nothing is unwound, as after a kill: every file that is read again is whole or absent at any moment. Python runs a
    signal's handler only between two of its instructions, hence not while XLA compiles; a thread, which the signal
    wakes through a socket, need not wait. Code that sets a handler of its own, as :func:`kdjax.train.fit` does in order
    to save first, is left to decide.
    """
    woken, waker = socket.socketpair()
    waker.setblocking(False)

    def handler(number, frame):
        del number, frame  # the thread has been woken already

    def wait(waker: socket.socket) -> None:
        while True:
            number = woken.recv(1)[0]
            if signal.getsignal(number) is handler:
                try:
                    say_stopped(Stopped(number, advice()))
                finally:
                    os._exit(128 + number)

    for number in heeded():
        signal.signal(number, handler)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    # The thread holds the sending end too, which would otherwise be closed here.
    threading.Thread(target=wait, args=(waker,), daemon=True).start()


def say_stopped(ended: SystemExit) -> None:
    """Says in one line why a process was stopped, if it was, and unless the one that started it will."""
    message = getattr(ended, "message", None)
    if message and WORKER not in os.environ:
        line = "\n" * sys.stderr.isatty() + f"{message}\n"  # below the progress bar
        os.write(2, line.encode())  # another thread may hold the lock of the stream
