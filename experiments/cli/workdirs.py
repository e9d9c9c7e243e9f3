"""A workdir belongs to one run and one process at a time; locks, and what several runs share."""

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from experiments.cli.options import Launch
from kdjax import files, models, results, study

_LOCK = ".lock"  # the first file in every workdir
_claimed: list[IO[str]] = []  # the open locks of this process


def begin(launch: Launch, made_from: Mapping[str, Any], about: study.Study, arms: Iterable[str]) -> Path:
    """Claims the workdir of a study and writes down what it will compare, before the first run.

    ``made_from`` is that of :func:`claim_workdir`; ``arms`` are all that will be run.

    Raises:
      ValueError: as :func:`claim_workdir` does, or if ``--output`` holds a result of another run and nothing says why
        this one supersedes it.
    """
    if launch.output and not launch.supersedes and Path(launch.output).exists():
        there, ours = _declared(Path(launch.output)), _declared(Path(launch.workdir) / "results.json")
        if there is None or there != ours:
            raise ValueError(
                f"--output={launch.output} holds the result of another run, and results stay. Name another file, or "
                "say with --supersedes why this one supersedes it: the earlier one is then kept in history/ beside it."
            )
    workdir = claim_workdir(launch.workdir, made_from)
    study.declare(workdir, about, arms)
    return workdir


def _declared(path: Path) -> str | None:
    """When the study of a result was declared; None if there is none, or it is of before such times were kept."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        return results.read(path)["plan"][0]["declared"]
    return None


def claim_workdir(path: str, made_from: Mapping[str, Any]) -> Path:
    """Makes a workdir this run's own, or takes it up again if an equal run was begun there.

    A workdir in which another run has left no work is taken over, so that a corrected command can follow one that
    diverged at once. A record that is missing or damaged is written again: all other files that are read back carry the
    identity of their run, and are refused if it is another's.

    ``made_from`` is every setting that decides the run's numbers, the fingerprint of its data, and the digest of the
    weights of a teacher that it takes up.

    Raises:
      ValueError: if it holds another run or other files, or another process is at work there.
    """
    workdir, record, wanted = Path(path), Path(path) / "run.json", files.json_ready(dict(made_from))
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={path} is a file; name a directory.")
    if not record.exists() and not (workdir / _LOCK).exists() and workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"--workdir={path} holds files of something else; name an empty or a new directory.")
    different = ""
    try:
        different = files.differences(files.read_sealed(record), wanted, most=6)
    except FileNotFoundError:
        pass
    except files.Damaged as error:
        warnings.warn(f"{error} It is written again.", stacklevel=2)
    if different and _holds_work(workdir):
        raise ValueError(
            f"--workdir={path} holds another run ({different}); name another directory, or delete that one."
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / _LOCK, "w")  # noqa: SIM115
        if not files.lock_file(handle, wait=False):
            handle.close()
            raise ValueError(f"--workdir={path} is in use by another process; wait for it, or name another.")
        _claimed.append(handle)
        if different:  # what that run wanted to compare is no earlier plan of this one
            (workdir / "plan.json").unlink(missing_ok=True)
        files.write_sealed(record, wanted)
    return workdir


def _holds_work(workdir: Path) -> bool:
    """Whether a run has left more than its record and plan; one that was refused, or diverged at once, has not."""
    return any(
        path.is_file()
        and path.suffix not in (".tmp", _LOCK)
        and path.name not in ("run.json", "plan.json", _LOCK)
        for path in workdir.rglob("*")
    )


def claimed() -> Path | None:
    """The workdir that this process claimed first."""
    return Path(_claimed[0].name).parent if _claimed else None


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Gives back the workdirs that are claimed within, for a process that runs several experiments in turn."""
    held = len(_claimed)
    try:
        yield
    finally:
        while len(_claimed) > held:
            _claimed.pop().close()


@contextlib.contextmanager
def shared_cache(
    store: str | None, own: Path, fingerprint: Mapping[str, Any], **decides: Any
) -> Iterator[Path]:
    """The directory in ``store`` for what these data and settings decide; ``own`` where there is no store.

    It is locked within, so that what two runs need at the same time is computed by one of them.
    """
    name = files.digest_json({"data": fingerprint, **decides})[:16]
    directory = own if store is None else Path(store) / name
    with files.lock(f"{directory}.lock"):
        yield directory


def check_disk(workdir: str, runs: Mapping[models.Network, int], *, cache_bytes: int) -> None:
    """Raises a ValueError if the disk has less room than the checkpoints and cached answers of a study will need.

    ``runs`` says how many of each network are trained. A run keeps two checkpoints of parameters, two moments and the
    best parameters, and its final weights; one more is there while it is written.
    """
    needed = 4 * 13 * sum(n * network.num_parameters for network, n in runs.items()) + cache_bytes + 2**24
    absolute = Path(workdir).absolute()
    free = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    if free < needed:
        raise ValueError(
            f"this run needs about {needed / 2**20:.0f} MiB in {workdir}, the disk has {free / 2**20:.0f} MiB left; "
            "free some space, or name a --workdir on another disk; --teacher_mode=online caches no answers."
        )
