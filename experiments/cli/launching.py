"""Starting an experiment: flags are parsed, errors become one sentence, and a signal ends it with one line."""

import contextlib
import errno
import io
import logging as python_logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from experiments import stopping
from experiments.cli import compilation_cache, workdirs
from kdjax import interrupts, train

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def launch(
    main: Callable[..., Any],
    *,
    takes: str = "",
    before: Callable[[Sequence[str]], None] = lambda argv: None,
) -> None:
    """Parses the flags and runs ``main``.

    Wrong input ends in one sentence and exit code 2; help exits 0. A process that is asked to stop says in one line
    what is kept, and exits with 130 after Ctrl-C and 143 after SIGTERM.

    Args:
      main: the experiment.
      takes: what arguments that are no flags are, if it takes some; they are passed to ``main`` as a list.
      before: called with the arguments before they are parsed, for a program whose flags depend on them.
    """
    stopping.end_on_signals(_advice)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not cost a result

    def parse(argv: Sequence[str]) -> list[str]:
        with _refusing():
            before(argv)
        return _parsed(argv)

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax reports every save at the level of information
        python_logging.getLogger("matplotlib").setLevel("ERROR")  # it warns where there is no home directory
        warnings.showwarning = lambda message, *_, **__: compilation_cache.note(str(message))
        with _refusing():
            compilation_cache.keep()
            if len(argv) > 1 and not takes:
                raise ValueError(f"unexpected arguments {argv[1:]}: every option is a flag, --NAME=VALUE.")
            simulate_devices()
            main(*([list(argv[1:])] if takes else []))

    app.run(guarded, flags_parser=parse)


def simulate_devices() -> None:
    """Divides a CPU into as many devices as --devices asks for; before JAX's first operation.

    The loops of rows-first convolution do not divide among threads: several cores train one network as several devices.
    """
    wanted = flags.FLAGS["devices"].value if "devices" in flags.FLAGS else None
    if wanted is not None and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", wanted)


def _parsed(argv: Sequence[str]) -> list[str]:
    """Sets the flags; absl's errors become one sentence, and its help exits 0."""
    try:
        left = flags.FLAGS(list(argv))
        check_finite(flags.FLAGS)
        return left
    except (flags.Error, ValueError) as error:
        _refuse(f"{' '.join(str(error).split()).rstrip(' .')}; --help lists all flags.")
    except SystemExit:  # by --help, --helpshort or --helpfull, which absl calls a failure
        sys.exit(0)


def check_finite(values: flags.FlagValues) -> None:
    """Refuses NaN and infinity, which no range of a flag excludes."""
    for name in values:
        flag = values[name]
        if isinstance(flag.value, float) and flag.present and not math.isfinite(flag.value):
            raise ValueError(f"flag --{name}={flag.value} must be a finite number")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turns errors of the user's, and of the machine's, into one sentence and exit code 2."""
    try:
        yield
    except interrupts.Stopped as stopped:
        stopping.say(stopped.message)
        raise
    except KeyboardInterrupt:  # by a second Ctrl-C, while training is about to save
        stopped = interrupts.Stopped(signal.SIGINT, _advice())
        stopping.say(stopped.message)
        raise stopped from None
    except (ValueError, train.NonFiniteLoss) as error:
        said = str(error)  # the library says num_train=5000 where the user has written --num_train=5000
        _refuse(f"--{said}" if said.partition("=")[0] in flags.FLAGS else said)
    except ImportError as error:
        if "pip install" in str(error):
            _refuse(str(error))
        _refuse(f"{error}. Install what the experiments need: pip install 'kdjax[experiments]'.")
    except OSError as error:
        _refuse(_sentence(error))


def _sentence(error: OSError) -> str:
    """What the operating system refused, and what to do about it."""
    if error.errno is None:  # a full sentence already
        return str(error)
    if error.errno in _FULL_DISK:
        return f"the disk is full ({error}). Free some space and start the same command again."
    path = Path(error.filename or "no file named")
    broken = next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)
    if broken:
        return f"{broken} is a link to {os.readlink(broken)}, which does not exist; create that, or name another path."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{path} would have to be a directory, but a file of this name or above it is in the way."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} cannot be read or written by this user ({error.strerror}); name another path."
    return f"{error.strerror or error}: {path}."


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _advice() -> str:
    """What is kept of a process that is stopped now."""
    if (workdir := workdirs.claimed()) is None:
        return "nothing was lost; start the same command again."
    return f"what is finished in {workdir} is kept, and the same command continues."
