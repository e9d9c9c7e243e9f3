"""How a process ends on Ctrl-C and SIGTERM. Imports nothing heavy, so that it holds while JAX is imported."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
WORKER = "KDJAX_TASK"  # environment variable of a worker, whose parent does the talking


def heeded() -> list[signal.Signals]:
    """The signals that are not ignored; a shell ignores Ctrl-C for a job in the background."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def end_on_signals(advice: Callable[[], str] = lambda: "nothing was written.") -> None:
    """Makes SIGINT and SIGTERM end the process at once, with one line that closes with ``advice()``.

    Nothing is unwound, as after a kill: every file that is read again is whole or absent at any moment. Python runs
    signal handlers only between two of its instructions, so not while XLA compiles; hence a thread, which the signal
    wakes through a socket. While other code has its own handler, as :func:`kdjax.train.fit` does in order to save
    first, the thread does nothing.
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
                    say(f"stopped by {SIGNALS[signal.Signals(number)]}; {advice()}")
                finally:
                    os._exit(128 + number)

    for number in heeded():
        signal.signal(number, handler)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    # The thread holds the sending end too, which would otherwise be closed here.
    threading.Thread(target=wait, args=(waker,), daemon=True).start()


def say(message: str) -> None:
    """Writes why the process stops as one line, below a progress bar; a worker leaves that to its parent."""
    if WORKER not in os.environ:
        # Not by the stream, whose lock another thread may hold.
        os.write(2, ("\n" * sys.stderr.isatty() + f"{message}\n").encode())
