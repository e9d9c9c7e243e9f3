"""Starting an experiment: flags, one sentence per error, a workdir of its own, and what is shown on the way."""

import contextlib
import errno
import io
import logging as python_logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from tqdm import tqdm

from experiments import process
from experiments.common import compiled
from kdjax import files, train

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def launch(main: Callable[[], Any], *, before: Callable[[Sequence[str]], None] = lambda argv: None) -> None:
    """Parses the flags and runs ``main``; whatever is wrong with its input becomes one sentence and exit code 2.

    Help is no error and exits 0. A process that is asked to stop says in one line what is kept, and exits 130 after
    Ctrl-C and 143 after SIGTERM, so that in ``distill && deploy`` nothing is deployed.

    ``before`` is called with the arguments before they are parsed, for a program whose flags depend on them.
    """
    process.end_on_signals(_advice)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to lose a result

    def parse(argv: Sequence[str]) -> list[str]:
        with _refusing():
            before(argv)
        return _parsed(argv)

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax reports every save at the level of information
        python_logging.getLogger("matplotlib").setLevel("ERROR")  # it warns where there is no home directory
        warnings.showwarning = lambda message, *_, **__: compiled.note(str(message))
        with _refusing():
            compiled.keep()
            if len(argv) > 1:
                raise ValueError(
                    f"unexpected arguments {argv[1:]}: every option is a flag, as in --workdir=runs/one."
                )
            main()

    app.run(guarded, flags_parser=parse)


def _parsed(argv: Sequence[str]) -> list[str]:
    """Sets the flags; absl's refusals become one sentence, and its help exits 0."""
    try:
        left = flags.FLAGS(list(argv))
        check_finite(flags.FLAGS)
        return left
    except (flags.Error, ValueError) as error:
        _refuse(f"{' '.join(str(error).split()).rstrip(' .')}; --help lists all flags.")
    except SystemExit:  # by --help, --helpshort or --helpfull, which absl calls a failure
        sys.exit(0)


def check_finite(values: flags.FlagValues) -> None:
    """Refuses NaN and infinity, which pass the range of any flag or break the loss in the end."""
    for name in values:
        value = values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"flag --{name}={value} must be a finite number")


def refuse_given(names: Iterable[str], because: str) -> None:
    """Refuses those of the flags that were given, since they would decide nothing and yet be recorded."""
    given = [
        f"--{name}={flags.FLAGS[name].value}" for name in names if not flags.FLAGS[name].using_default_value
    ]
    if given:
        raise ValueError(f"{' and '.join(given)} would change nothing: {because}.")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except SystemExit as ended:
        process.say_stopped(ended)
        raise
    except KeyboardInterrupt:  # by a second Ctrl-C, while training is about to save
        stopped = process.Stopped(signal.SIGINT, _advice())
        process.say_stopped(stopped)
        raise stopped from None
    except (ValueError, train.NonFiniteLoss) as error:
        _refuse(str(error))
    except ImportError as error:
        missing = str(error)
        if "pip install" not in missing:
            missing = f"{missing}. Install what the experiments need: pip install 'kdjax[experiments]'."
        _refuse(missing)
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
    """What someone who stops this process wants to know."""
    if not _locks:
        return "nothing was lost; start the same command again."
    return f"what is finished in {Path(_locks[0].name).parent} is kept, and the same command continues."


def claim_workdir(path: str, made_from: Mapping[str, Any]) -> Path:
    """Makes the workdir this run's own, or takes it up again if an equal run was begun there.

    A workdir without any work of the other run is taken over, so that a corrected command can follow one that has
    diverged at once. A record that is missing or damaged is written again: everything else that is read back from a
    workdir carries the identity of its run too, and is refused if it is another's.

    Args:
      path: of the workdir.
      made_from: every setting that decides the run's numbers, the fingerprint of its data, and the digest of the
        weights of a teacher that it takes up.

    Raises:
      ValueError: if it holds a run that was made from something else, or files of something else.
    """
    workdir, record, wanted = Path(path), Path(path) / "run.json", files.json_ready(dict(made_from))
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={path} is a file; name a directory.")
    if not record.exists() and not (workdir / _LOCK).exists() and workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"--workdir={path} holds files of something else; name an empty or a new directory.")
    try:
        different = files.differences(files.read_sealed(record), wanted, most=6)
    except FileNotFoundError:
        different = ""
    except files.Damaged as error:
        warnings.warn(f"{error} It is written again.", stacklevel=2)
        different = ""
    if different and _holds_work(workdir):
        raise ValueError(
            f"--workdir={path} holds another run ({different}); name another directory, or delete that one."
        )
    _lock(workdir)
    if jax.process_index() == 0:
        files.write_sealed(record, wanted)
    return workdir


def _holds_work(workdir: Path) -> bool:
    """Whether a run has left more than its record; one that was refused, or has diverged at once, has not."""
    return any(
        path.is_file() and path.suffix not in (".tmp", _LOCK) and path.name not in ("run.json", _LOCK)
        for path in workdir.rglob("*")
    )


_LOCK = ".lock"  # in every workdir, from before anything else is
_locks: list[Any] = []  # open until the process ends


def _lock(workdir: Path) -> None:
    """Holds the workdir for this process; a ValueError if another one is at work there."""
    if jax.process_index() > 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    handle = open(workdir / _LOCK, "w")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ValueError(
            f"--workdir={workdir} is in use by another process; wait for it, or name another directory."
        ) from None
    _locks.append(handle)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Gives back the workdirs that were claimed within: for a process that runs one experiment after another."""
    held = len(_locks)
    try:
        yield
    finally:
        while len(_locks) > held:
            _locks.pop().close()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process is within; the lock on this file goes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            import fcntl

            if jax.process_index() == 0:  # the other processes of a pod follow the first
                fcntl.flock(handle, fcntl.LOCK_EX)
        except ImportError:  # Windows
            pass
        yield


def settings_of(module: Mapping[str, Any], *, apart: Sequence[str]) -> dict[str, Any]:
    """The flags that an experiment defines and that decide its numbers; its ``globals()``, and those that do not."""
    own = {holder.name: holder.value for holder in module.values() if isinstance(holder, flags.FlagHolder)}
    return {name: value for name, value in sorted(own.items()) if name not in apart}


@contextlib.contextmanager
def bar(label: str, *, total: int, unit: str) -> Iterator[tqdm]:
    """A progress bar on the terminal of the first process; nothing in a log."""
    with tqdm(
        total=total, desc=label, unit=unit, disable=None if jax.process_index() == 0 else True, leave=False
    ) as meter:
        yield meter


def say(text: str) -> None:
    """Prints from the first process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)
